"""The step loop: propose, select, verify, then accept or rewrite; one record per step.

Knows the seam (`specguard.core.model`) and nothing of the models behind it. Plain decoding by the
target or the draft alone runs through the same loop and statistics.
"""

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from specguard.core.config import TARGET_SELECTOR, Author, SolveConfig
from specguard.core.errors import SpecguardError, UsageError
from specguard.core.grounding import source_mask
from specguard.core.model import (
    Boundary,
    Candidate,
    Capture,
    LanguageModel,
    Observation,
    Sampling,
    TokenSequence,
)
from specguard.core.randomness import Purpose, problem_key, uniforms
from specguard.core.records import (
    CandidateRecord,
    Decision,
    FinishReason,
    Phase,
    Solution,
    StepRecord,
    TokenArrays,
    summarise,
)
from specguard.core.selector import Embedder, Selection, best_verdict, distinct, select_medoid
from specguard.core.text import PieceTable, final_answer, is_looping
from specguard.core.verifier import Verdict, verify

MAX_LOOP_PERIOD, NUM_LOOP_ROUNDS = 4, 3  # steps: the same four or fewer, three times over
MAX_TOKEN_PERIOD, NUM_TOKEN_ROUNDS = 16, 8  # tokens within one step that hit its cap


def solve_steps(
    problem: str,
    draft: LanguageModel[Any] | None,
    target: LanguageModel[Any] | None,
    embed: Embedder,
    config: SolveConfig,
) -> Generator[StepRecord, None, Solution]:
    """Yield the steps of a solution as they are decided and return the solution.

    A plain method needs its own model only. Closing the generator closes every sequence.

    Raises:
        UsageError: a blank problem, or a model that the method needs is missing.
        SpecguardError: the problem does not fit the context window, or attention is weighed and
            the verifying model cannot be captured.
    """
    run = _Run(problem, draft, target, embed, config)
    try:
        while run.finish_reason is None:
            if config.method != "specguard":
                yield run.write_plainly(config.method)
                continue
            candidates = run.propose()
            selection = run.select(candidates)
            selected = candidates[selection.index]
            verdict = run.verify(selected, selection)
            if verdict.is_accepted:
                run.accept(selected)
                yield run.record("accepted", selected, candidates, selection, verdict)
            else:
                rewritten = run.rewrite()
                yield run.record("rewritten", rewritten, candidates, selection, verdict)
        return run.solution()
    finally:
        run.close()


class _Run:
    """One problem's state: a sequence per model, the steps so far, the clock.

    A model's sequence is opened when it is first needed and catches up on tokens that the other
    model wrote in one pass, so a verifying draft keeps the target out until a step is rejected.
    """

    def __init__(
        self,
        problem: str,
        draft: LanguageModel[Any] | None,
        target: LanguageModel[Any] | None,
        embed: Embedder,
        config: SolveConfig,
    ) -> None:
        self.config = config
        self.embed = embed
        self.models = _models_in_use(draft, target, config)
        if not problem.strip():
            raise UsageError("the problem is empty", "give it as an argument, with --file or on -")
        self.problem = problem
        lead = self.models.get("target") or self.models["draft"]
        self.tokenizer = lead.tokenizer
        self.prompt = self.tokenizer.encode_prompt(problem, config.system_prompt, config.thinking)
        self.context_limit = min(model.context_limit for model in self.models.values())
        if len(self.prompt.token_ids) >= self.context_limit:
            raise SpecguardError(
                f"the problem takes {len(self.prompt.token_ids)} tokens and the context window "
                f"holds {self.context_limit}",
                "shorten the problem or choose a pair with a longer context",
            )
        self.sequences: dict[Author, TokenSequence] = {}
        self.token_ids = list(self.prompt.token_ids)
        self.key = problem_key(problem)
        self.steps: list[StepRecord] = []
        self.text = ""
        self.cut_ids: list[int] = []  # tokens since the last step that ended by itself
        self.cut_text = ""
        self.num_verified_tokens = 0
        self.seconds: dict[Phase, float] = {}
        self.finish_reason: FinishReason | None = None
        self.capture: Capture | None = None
        self.observation: Observation | None = None
        self.verdicts: dict[int, Verdict] = {}  # of candidates that no sequence has taken in yet
        self.pieces = PieceTable(self.tokenizer)
        self.started = time.perf_counter()

    # The phases of a step, in the order of the loop.

    def propose(self) -> list[Candidate]:
        """The draft's candidates for the next step."""
        with self._phase("propose"):
            return self._propose("draft", self.config.num_candidates, self.config.step_sampling)

    def select(self, candidates: list[Candidate]) -> Selection:
        """The most consistent candidate, or the one that the target scores highest."""
        self.capture = self.observation = None
        self.verdicts = {}
        with self._phase("select"):
            selection = select_medoid(candidates, self.embed)
            alternatives = distinct(candidates)
        if self.config.selector != TARGET_SELECTOR or len(alternatives) == 1:
            return selection
        with self._phase("verify"):
            self.capture = self._capture()
            scored = self._score([candidates[index] for index in alternatives])
            observations = dict(zip(alternatives, scored, strict=True))
            for index, observation in observations.items():
                self.verdicts[index] = verify(
                    observation, self.capture, selection.similarities[index], self.config.verifier
                )
            best = best_verdict(self.verdicts)
            self.observation = observations[best]
            return Selection(best, selection.similarities)

    def verify(self, selected: Candidate, selection: Selection) -> Verdict:
        """Judge the selected candidate; a verifying pass is also its KV in that model."""
        config = self.config.verifier
        if selection.index in self.verdicts:
            return self.verdicts[selection.index]
        with self._phase("verify"):
            if config.needs_attention or (config.needs_model and config.model == "target"):
                self.capture = self._capture()
                self.observation = self._extend(config.model, selected.token_ids, self.capture)
            observation = self.observation or Observation(
                selected.token_logprobs, selected.token_entropies
            )
            consistency = selection.similarities[selection.index]
            return verify(observation, self.capture, consistency, config)

    def accept(self, selected: Candidate) -> None:
        """Keep the draft's step: its KV is committed, unless verifying it already did so."""
        with self._phase("commit"):
            if self.observation is None or self.config.verifier.model != "draft":
                self.models["draft"].commit([self.sequences["draft"]], [selected])
            if self.verdicts:
                assert self.observation is not None
                kept = replace(selected, handle=self.observation.handle)
                self.models["target"].commit([self.sequences["target"]], [kept])
            self.token_ids.extend(selected.token_ids)

    def rewrite(self) -> Candidate:
        """Take the rejected step back and have the target write it."""
        with self._phase("rewrite"):
            if self.observation is not None and not self.verdicts:
                author = self.config.verifier.model
                self.models[author].rewind(self.sequences[author], len(self.token_ids))
            [rewritten] = self._propose("target", 1, self.config.rewrite_sampling)
            self.models["target"].commit([self.sequences["target"]], [rewritten])
            self.token_ids.extend(rewritten.token_ids)
            return rewritten

    def write_plainly(self, author: Author) -> StepRecord:
        """The next step by one model alone."""
        with self._phase("propose"):
            [step] = self._propose(author, 1, self.config.step_sampling)
        with self._phase("commit"):
            self.models[author].commit([self.sequences[author]], [step])
            self.token_ids.extend(step.token_ids)
        return self.record("plain", step, [step] if author == "draft" else [])

    # Records.

    def record(
        self,
        decision: Decision,
        written: Candidate,
        candidates: list[Candidate],
        selection: Selection | None = None,
        verdict: Verdict | None = None,
    ) -> StepRecord:
        """Close the step: its record, and whether the solution ends with it."""
        selected = candidates[selection.index] if selection else written
        by_target = decision == "rewritten" or (
            decision == "plain" and self.config.method == "target"
        )
        text = self._text_of(written)
        step = StepRecord(
            index=len(self.steps),
            text=text,
            author="target" if by_target else "draft",
            decision=decision,
            num_tokens=len(written.token_ids),
            num_drafted=sum(len(candidate.token_ids) for candidate in candidates),
            signals=dict(verdict.signals) if verdict else {},
            scores=dict(verdict.scores) if verdict else {},
            threshold=self.config.verifier.threshold if verdict else None,
            seconds=self.seconds,
            draft_text=selected.text if decision == "rewritten" else None,
            selected=selection.index if selection else None,
            candidates=self._candidate_records(candidates, selection),
            tokens=self._token_arrays(selected, verdict),
        )
        self.seconds = {}
        self.steps.append(step)
        self.text += text
        self.finish_reason = self._finish_reason(written)
        return step

    def solution(self) -> Solution:
        """The finished solution."""
        assert self.finish_reason is not None
        return Solution(
            problem=self.problem,
            answer=final_answer(self.text),
            text=self.text,
            finish_reason=self.finish_reason,
            steps=tuple(self.steps),
            stats=summarise(
                self.steps,
                time.perf_counter() - self.started,
                len(self.prompt.token_ids),
                self.num_verified_tokens,
            ),
            config=self.config,
            draft=self.models["draft"].name if "draft" in self.models else None,
            target=self.models["target"].name if "target" in self.models else None,
            is_calibrated=self.config.verifier.is_calibrated,
        )

    def close(self) -> None:
        """Close every sequence."""
        for sequence in self.sequences.values():
            sequence.close()

    # Parts.

    @contextmanager
    def _phase(self, phase: Phase) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def _propose(self, author: Author, num_candidates: int, sampling: Sampling) -> list[Candidate]:
        sequence = self._caught_up(author)
        boundary = Boundary(
            self.config.delimiter,
            self.tokenizer.eos_ids,
            min(self.config.max_step_tokens, self._room()),
        )
        draws = uniforms(
            self.config.seed,
            self.key,
            Purpose.DRAFT if author == "draft" else Purpose.TARGET,
            len(self.steps),
            num_candidates,
            boundary.max_tokens,
        )
        [candidates] = self.models[author].propose(
            [sequence], num_candidates, sampling, boundary, draws[np.newaxis]
        )
        return candidates

    def _extend(
        self, author: Author, token_ids: tuple[int, ...], capture: Capture | None = None
    ) -> Observation:
        sequence = self._caught_up(author)
        [observation] = self.models[author].extend([sequence], [token_ids], [capture])
        if author == "target":
            self.num_verified_tokens += len(token_ids)
        return observation

    def _score(self, candidates: list[Candidate]) -> list[Observation]:
        sequence = self._caught_up("target")
        continuations = [candidate.token_ids for candidate in candidates]
        [observations] = self.models["target"].score([sequence], [continuations], [self.capture])
        self.num_verified_tokens += sum(map(len, continuations))
        return observations

    def _caught_up(self, author: Author) -> TokenSequence:
        """The model's sequence with every token so far in it."""
        if author not in self.sequences:
            self.sequences[author] = self.models[author].start(self.prompt)
        sequence = self.sequences[author]
        unseen = self.token_ids[len(sequence.token_ids) :]
        if unseen:
            self.models[author].extend([sequence], [unseen])
            if author == "target":
                self.num_verified_tokens += len(unseen)
        return sequence

    def _room(self) -> int:
        """Tokens that may still be written."""
        written = len(self.token_ids) - len(self.prompt.token_ids)
        return min(self.config.max_tokens - written, self.context_limit - len(self.token_ids))

    def _capture(self) -> Capture | None:
        verifier = self.config.verifier
        if self.models[verifier.model].capture_refusal is not None:
            return None
        is_source = source_mask(self.prompt, len(self.token_ids), verifier.sources)
        return Capture(is_source, verifier.num_layers, verifier.epsilon)

    def _text_of(self, written: Candidate) -> str:
        """The step's text; after a cut it is read on from there, a character may span the two."""
        self.cut_ids.extend(written.token_ids)
        text = self.tokenizer.decode(self.cut_ids)
        is_cut = written.finish == "length"
        if is_cut:
            text = text.rstrip("\ufffd")
        new, self.cut_text = text[len(self.cut_text) :], text
        if not is_cut:
            self.cut_ids, self.cut_text = [], ""
        return new

    def _candidate_records(
        self, candidates: list[Candidate], selection: Selection | None
    ) -> tuple[CandidateRecord, ...] | None:
        if not self.config.detail or selection is None:
            return None
        scores = {
            candidates[index].token_ids: verdict.scores["ensemble"]
            for index, verdict in self.verdicts.items()
        }
        return tuple(
            CandidateRecord(
                text=candidate.text,
                token_ids=candidate.token_ids,
                token_logprobs=tuple(candidate.token_logprobs.tolist()),
                similarity=similarity,
                finish=candidate.finish,
                score=scores.get(candidate.token_ids),
            )
            for candidate, similarity in zip(candidates, selection.similarities, strict=True)
        )

    def _token_arrays(self, selected: Candidate, verdict: Verdict | None) -> TokenArrays | None:
        if not self.config.detail:
            return None
        seen = self.observation if verdict and self.observation else selected
        grounding = verdict.token_grounding if verdict else None
        return TokenArrays(
            token_ids=selected.token_ids,
            pieces=tuple(map(self.pieces, selected.token_ids)),
            logprobs=tuple(seen.token_logprobs.tolist()),
            entropies=tuple(seen.token_entropies.tolist()),
            grounding=None if grounding is None else tuple(grounding.tolist()),
        )

    def _finish_reason(self, written: Candidate) -> FinishReason | None:
        if final_answer(self.text) is not None:
            return "answer"
        if written.finish == "eos":
            return "eos"
        tail = [step.text.strip() for step in self.steps[-MAX_LOOP_PERIOD * NUM_LOOP_ROUNDS :]]
        if is_looping(tail, MAX_LOOP_PERIOD, NUM_LOOP_ROUNDS) or (
            written.finish == "length"
            and is_looping(written.token_ids, MAX_TOKEN_PERIOD, NUM_TOKEN_ROUNDS)
        ):
            return "repetition"
        if self._room() < 1 or len(self.steps) >= self.config.max_steps:
            return "length"
        return None


def _models_in_use(
    draft: LanguageModel[Any] | None, target: LanguageModel[Any] | None, config: SolveConfig
) -> dict[Author, LanguageModel[Any]]:
    """The models that the method needs.

    Raises:
        UsageError: one of them is missing.
        SpecguardError: the verifier weighs attention that its model cannot hand over.
    """
    wanted: tuple[Author, ...] = (
        ("draft", "target") if config.method == "specguard" else (config.method,)
    )
    given: dict[Author, LanguageModel[Any] | None] = {"draft": draft, "target": target}
    models: dict[Author, LanguageModel[Any]] = {}
    for author in wanted:
        model = given[author]
        if model is None:
            raise UsageError(f"method {config.method!r} needs a {author} model")
        models[author] = model
    if config.method == "specguard" and config.verifier.needs_attention:
        refusal = models[config.verifier.model].capture_refusal
        if refusal is not None:
            raise SpecguardError(
                f"the attention of {models[config.verifier.model].name} cannot be captured: "
                f"{refusal}",
                "verify by log-probability alone: --beta 1",
            )
    return models

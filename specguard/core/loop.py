"""The step loop: propose, select, verify, then accept or rewrite; one record per step.

Knows the seam (`specguard.core.model`) and nothing of the models behind it, nor of other problems:
what it wants of a model it yields as a request. Plain decoding by the target or the draft alone
runs through the same loop and statistics.
"""

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from specguard.core.config import TARGET_SELECTOR, Author, SolveConfig
from specguard.core.errors import SpecguardError, UsageError
from specguard.core.fallback import Fallback
from specguard.core.model import (
    Candidate,
    Capture,
    LanguageModel,
    Observation,
    Sampling,
)
from specguard.core.randomness import problem_key
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
from specguard.core.requests import Request, T, Work, perform
from specguard.core.reward import RewardModel, RewardSequence
from specguard.core.selector import Embedder, Selection, best_verdict, distinct, select_medoid
from specguard.core.text import final_answer, is_looping
from specguard.core.verifier import Verdict, by_reward, verify
from specguard.core.writing import Writer, Written

MAX_LOOP_PERIOD, NUM_LOOP_ROUNDS = 4, 3  # steps: the same four or fewer, three times over
MAX_TOKEN_PERIOD, NUM_TOKEN_ROUNDS = 16, 8  # tokens within one step that hit its cap


def solve_steps(
    problem: str,
    draft: LanguageModel[Any] | None,
    target: LanguageModel[Any] | None,
    embed: Embedder,
    config: SolveConfig,
    reward: RewardModel | None = None,
) -> Generator[StepRecord, None, Solution]:
    """Yield the steps of a solution as they are decided and return the solution.

    A method needs its own models only. Closing the generator closes every sequence.

    Raises:
        UsageError: a blank problem, or a model that the method needs is missing.
        SpecguardError: the problem does not fit the context window, or attention is weighed and
            the verifying model cannot be captured.
    """
    solving = solve_by_requests(problem, draft, target, embed, config, reward)
    try:
        result = None
        while True:
            event = solving.send(result)
            if isinstance(event, StepRecord):
                yield event
                result = None
            else:
                [result] = perform([event])
    except StopIteration as stop:
        solution: Solution = stop.value
        return solution
    finally:
        solving.close()


def solve_by_requests(
    problem: str,
    draft: LanguageModel[Any] | None,
    target: LanguageModel[Any] | None,
    embed: Embedder,
    config: SolveConfig,
    reward: RewardModel | None = None,
) -> Generator[Request | StepRecord, Any, Solution]:
    """`solve_steps`, but for the calls of the models: who sends their results may share them."""
    run = _Run(problem, draft, target, embed, config, reward)
    try:
        while run.finish_reason is None:
            if run.is_alone:
                yield (yield from run.write_alone())
                continue
            candidates = yield from run.propose()
            selection = yield from run.select(candidates)
            selected = candidates[selection.index]
            verdict = yield from run.verify(selected, selection)
            if verdict.is_accepted:
                run.accept(selected)
                yield run.record("accepted", Written(selected), candidates, selection, verdict)
            else:
                rewritten = yield from run.rewrite()
                yield run.record("rewritten", rewritten, candidates, selection, verdict)
        return run.solution()
    finally:
        run.close()


class _Run:
    """One problem's state: what is written, the steps so far, the clock."""

    def __init__(
        self,
        problem: str,
        draft: LanguageModel[Any] | None,
        target: LanguageModel[Any] | None,
        embed: Embedder,
        config: SolveConfig,
        reward: RewardModel | None,
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
        self.writer = Writer(self.models, self.prompt, problem_key(problem), config)
        if len(self.prompt.token_ids) >= self.writer.context_limit:
            raise SpecguardError(
                f"the problem takes {len(self.prompt.token_ids)} tokens and the context window "
                f"holds {self.writer.context_limit}",
                "shorten the problem or choose a pair with a longer context",
            )
        self.fallback = Fallback(config.draft_cost)
        self.judge = _judge(problem, reward, config)
        self.steps: list[StepRecord] = []
        self.text = ""
        self.cut_ids: list[int] = []  # tokens since the last step that ended by itself
        self.cut_text = ""
        self.seconds: dict[Phase, float] = {}
        self.finish_reason: FinishReason | None = None
        self.capture: Capture | None = None
        self.observation: Observation | None = None
        self.num_spared = 0
        self.verdicts: dict[int, Verdict] = {}  # of candidates that no sequence has taken in yet
        self.started = time.perf_counter()

    @property
    def is_alone(self) -> bool:
        """Whether one model writes the next step and nothing judges it."""
        return not self.config.is_stepwise or self.fallback.is_on

    # The phases of a step, in the order of the loop.

    def propose(self) -> Work[list[Candidate]]:
        """The draft's candidates for the next step: a few first, if so wished, then the others."""
        config = self.config
        k, sampling = config.num_candidates, config.step_sampling
        first = config.num_first_candidates or k
        few = self.writer.propose("draft", first, sampling)
        candidates = yield from self._timed("propose", few)
        self.num_spared = k - first
        if self.num_spared and len(distinct(candidates)) > 1:
            more = self.writer.propose_more(candidates, k, sampling)
            candidates = yield from self._timed("propose", more)
            self.num_spared = 0
        return candidates

    def select(self, candidates: list[Candidate]) -> Work[Selection]:
        """The most consistent candidate, or the one that the target scores highest."""
        self.capture = self.observation = None
        self.verdicts = {}
        with self._phase("select"):
            selection = select_medoid(candidates, self.embed)
            alternatives = distinct(candidates)
        if (
            self.config.selector != TARGET_SELECTOR
            or self.config.method != "specguard"
            or len(alternatives) == 1
        ):
            return selection
        return (yield from self._timed("verify", self._score(candidates, alternatives, selection)))

    def _score(
        self, candidates: list[Candidate], alternatives: list[int], selection: Selection
    ) -> Work[Selection]:
        self.capture = self.writer.capture(self.config.verifier)
        scored = yield from self.writer.score(
            [candidates[index] for index in alternatives], self.capture
        )
        observations = dict(zip(alternatives, scored, strict=True))
        for index, observation in observations.items():
            self.verdicts[index] = verify(
                observation, self.capture, selection.similarities[index], self.config.verifier
            )
        best = best_verdict(self.verdicts)
        self.observation = observations[best]
        return Selection(best, selection.similarities)

    def verify(self, selected: Candidate, selection: Selection) -> Work[Verdict]:
        """Judge the selected candidate; a verifying pass is also its KV in that model."""
        if selection.index in self.verdicts:
            return self.verdicts[selection.index]
        return (yield from self._timed("verify", self._verify(selected, selection)))

    def _verify(self, selected: Candidate, selection: Selection) -> Work[Verdict]:
        config = self.config.verifier
        if self.judge is not None:
            texts = [step.text for step in self.steps]
            return by_reward(
                self.judge.rewards([*texts, selected.text])[-1], self.config.reward_threshold
            )
        if config.needs_attention or (config.needs_model and config.model == "target"):
            self.capture = self.writer.capture(config)
            self.observation = yield from self.writer.read(
                config.model, selected.token_ids, self.capture
            )
        observation = self.observation or Observation(
            selected.token_logprobs, selected.token_entropies
        )
        return verify(observation, self.capture, selection.similarities[selection.index], config)

    def accept(self, selected: Candidate) -> None:
        """Keep the draft's step: its KV is committed, unless verifying it already did so."""
        with self._phase("commit"):
            if self.observation is None or self.config.verifier.model != "draft":
                self.writer.commit("draft", selected)
            if self.verdicts:
                assert self.observation is not None
                self.writer.commit("target", replace(selected, handle=self.observation.handle))
            self.writer.append(selected.token_ids)

    def rewrite(self) -> Work[Written]:
        """Take the rejected step back and have the target write it."""
        return (yield from self._timed("rewrite", self._rewrite()))

    def _rewrite(self) -> Work[Written]:
        if self.observation is not None and not self.verdicts:
            self.writer.take_back(self.config.verifier.model)
        sampling = self.config.rewrite_sampling
        if self.config.rewrite == "speculate":
            return (yield from self.writer.speculate(sampling))
        return (yield from self._write("target", sampling))

    def write_alone(self) -> Work[StepRecord]:
        """The next step by one model, nothing judging it; "sd" lets the draft guess tokens."""
        method, sampling = self.config.method, self.config.step_sampling
        if self.fallback.is_on:
            self.fallback.saw_plain()
            written = yield from self._timed(
                "rewrite", self._write("target", self.config.rewrite_sampling)
            )
            return self.record("plain", written, [], is_fallback=True)
        if method == "sd":
            written = yield from self._timed("rewrite", self.writer.speculate(sampling))
            return self.record("plain", written, [])
        author: Author = "target" if method == "target" else "draft"
        written = yield from self._timed("propose", self._write(author, sampling))
        return self.record("plain", written, [written.step] if author == "draft" else [])

    def _write(self, author: Author, sampling: Sampling) -> Work[Written]:
        [step] = yield from self.writer.propose(author, 1, sampling)
        self.writer.commit(author, step)
        self.writer.append(step.token_ids)
        return Written(step)

    # Records.

    def record(
        self,
        decision: Decision,
        written: Written,
        candidates: list[Candidate],
        selection: Selection | None = None,
        verdict: Verdict | None = None,
        is_fallback: bool = False,
    ) -> StepRecord:
        """Close the step: its record, and whether the solution ends with it."""
        selected = candidates[selection.index] if selection else written.step
        by_target = decision == "rewritten" or (
            decision == "plain" and self.config.method != "draft"
        )
        text = self._text_of(written.step)
        step = StepRecord(
            index=len(self.steps),
            text=text,
            author="target" if by_target else "draft",
            decision=decision,
            num_tokens=len(written.step.token_ids),
            num_drafted=sum(len(candidate.token_ids) for candidate in candidates),
            signals=dict(verdict.signals) if verdict else {},
            scores=dict(verdict.scores) if verdict else {},
            threshold=self._threshold if verdict else None,
            seconds=self.seconds,
            draft_text=selected.text if decision == "rewritten" else None,
            selected=selection.index if selection else None,
            candidates=self._candidate_records(candidates, selection),
            tokens=self._token_arrays(selected, verdict),
            num_guessed=written.num_guessed,
            num_kept=written.num_kept,
            is_fallback=is_fallback,
            num_spared=self.num_spared if verdict else 0,
        )
        if verdict is not None:
            self.fallback.saw_drafted(
                len(candidates),
                max(len(candidate.token_ids) for candidate in candidates),
                step.num_tokens,
                verdict.is_accepted,
            )
        self.seconds = {}
        self.steps.append(step)
        self.writer.step = len(self.steps)
        self.text += text
        self.finish_reason = self._finish_reason(written.step)
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
                self.writer.num_verified_tokens,
            ),
            config=self.config,
            draft=self.models["draft"].name if "draft" in self.models else None,
            target=self.models["target"].name if "target" in self.models else None,
            is_calibrated=self.config.verifier.is_calibrated,
        )

    def close(self) -> None:
        """Close every sequence."""
        self.writer.close()
        if self.judge is not None:
            self.judge.close()

    # Parts.

    @property
    def _threshold(self) -> float:
        is_rsd = self.config.method == "rsd"
        return self.config.reward_threshold if is_rsd else self.config.verifier.threshold

    def _timed(self, phase: Phase, work: Work[T]) -> Work[T]:
        """Do the work on this phase's account: its own time, and its share of the calls."""
        result = None
        while True:
            try:
                with self._phase(phase):
                    request = work.send(result)
            except StopIteration as stop:
                found: T = stop.value
                return found
            result = yield request
            self.seconds[phase] += request.seconds

    @contextmanager
    def _phase(self, phase: Phase) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

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
        if not self.config.detail or (verdict is None and self.config.method == "sd"):
            return None
        seen = self.observation if verdict and self.observation else selected
        grounding = verdict.token_grounding if verdict else None
        return TokenArrays(
            token_ids=selected.token_ids,
            pieces=tuple(map(self.writer.pieces, selected.token_ids)),
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
        if self.writer.room < 1 or len(self.steps) >= self.config.max_steps:
            return "length"
        return None


def _judge(problem: str, reward: RewardModel | None, config: SolveConfig) -> RewardSequence | None:
    """What judges steps in reward-guided decoding, None in every other method."""
    if config.method != "rsd":
        return None
    if reward is None:
        raise UsageError("method 'rsd' needs a reward model", "name one, or choose another method")
    return reward.start(problem)


def _models_in_use(
    draft: LanguageModel[Any] | None, target: LanguageModel[Any] | None, config: SolveConfig
) -> dict[Author, LanguageModel[Any]]:
    """The models that the method needs.

    Raises:
        UsageError: one of them is missing.
        SpecguardError: the verifier weighs attention that its model cannot hand over.
    """
    given: dict[Author, LanguageModel[Any] | None] = {"draft": draft, "target": target}
    models: dict[Author, LanguageModel[Any]] = {}
    for author in config.authors:
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

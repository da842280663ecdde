"""The step loop: propose, select, verify, then accept or rewrite; one record per step.

Knows the seam (`specguard.core.engine`) and nothing of the engines behind it, nor of other
problems. Plain decoding by the target or the draft alone runs through the same loop and statistics.
"""

from collections.abc import AsyncGenerator, Collection
from dataclasses import replace
from functools import partial

import numpy as np

from specguard.core.checks import check_problem
from specguard.core.config import TARGET_SELECTOR, Author, SolveConfig
from specguard.core.context import ProblemContext, both_seen, joined
from specguard.core.engine import (
    Candidate,
    Capture,
    Observation,
    Prompt,
    Sampling,
)
from specguard.core.errors import SpecguardError
from specguard.core.fallback import TYPICAL_STEP, Fallback
from specguard.core.pairing import Pair
from specguard.core.progress import Observer
from specguard.core.randomness import problem_key
from specguard.core.recorder import Recorder
from specguard.core.records import Decision, Solution, StepRecord
from specguard.core.reference import is_reference
from specguard.core.selector import Embedder, Selection, best_verdict, distinct, select_medoid
from specguard.core.speculation import Lookahead, write_by_guesses
from specguard.core.step import StepState, WrittenStep
from specguard.core.verifier import by_reward, verify

# While a draft's step is read part by part: by how much confidence in a part the next one is
# asked for, and the tokens of a part where the draft cannot say.
LEAST_CONFIDENCE, _PART = 0.15, 24


class Solving:
    """One problem on its way to a solution; its steps are iterated over once.

    ``prompt`` is what the models read of it, None: the problem behind the system prompt.
    ``observer`` is told of the tokens of those who are ``observed``; ``shares_passes``: other
    problems are solved beside this one.

    Raises:
        UsageError: a blank problem, or no text at all.
        SpecguardError: the pair lacks what the settings need, or the problem does not fit the
            context window.
    """

    def __init__(
        self,
        problem: str,
        pair: Pair,
        embed: Embedder,
        config: SolveConfig,
        observer: Observer | None = None,
        prompt: Prompt | None = None,
        observed: Collection[Author] = ("draft", "target"),
        shares_passes: bool = False,
    ) -> None:
        engines = pair.engines_for(config)
        check_problem(problem)
        if prompt is None:
            tokenizer = pair.tokenizer_for(config)
            prompt = tokenizer.encode_prompt(problem, config.system_prompt, config.thinking)
        self.problem, self.config = problem, config
        self.context = ProblemContext(
            engines, prompt, problem_key(problem), config, observer, observed
        )
        if len(prompt.token_ids) >= self.context.context_limit:
            raise SpecguardError(
                f"the problem takes {len(prompt.token_ids)} tokens and the context window "
                f"holds {self.context.context_limit}",
                "shorten the problem or choose a pair with a longer context",
            )
        self.recorder = Recorder(problem, self.context)
        is_confident = "draft" in engines and "confidence" in engines["draft"].features
        self.lookahead = Lookahead(config, pair.can_guess(config), shares_passes, is_confident)
        self._most_unread = config.max_step_tokens if is_confident else _PART
        self._knows_choices = "target" in engines and "choices" in engines["target"].features
        self.fallback = fallback_for(config)
        self.fallback.pace = self.lookahead.pace
        self._embed = embed
        self._needs_embeddings = pair.embedder_for(config) == "draft"
        self._reward = pair.reward if config.method == "rsd" else None

    async def steps(self) -> AsyncGenerator[StepRecord]:
        """The steps, each as it is decided; closing frees what the engines hold of the problem."""
        try:
            while self.recorder.finish_reason is None:
                if self.is_alone:
                    yield await self.write_alone()
                    continue
                if self.reads_along:
                    step = await self.propose_and_read()
                else:
                    step = await self.propose()
                    await self.select(step)
                    await self.verify(step)
                yield self.accept(step) if step.is_accepted else await self.rewrite(step)
        finally:
            self.context.release()
            if self._reward is not None:
                self._reward.release(self)

    def stop(self) -> None:
        """End the solution with the steps that are there; whoever iterates leaves off."""
        if self.recorder.finish_reason is None:
            self.recorder.finish_reason = "stop"

    def solution(self) -> Solution:
        """The solution, once all steps are there."""
        return self.recorder.solution()

    @property
    def is_alone(self) -> bool:
        """Whether one model writes the next step and nothing judges it."""
        return not self.config.is_stepwise or self.fallback.is_on

    @property
    def reads_along(self) -> bool:
        """Whether the target reads a step while it is drafted, to give it up once it is lost.

        For a single candidate that no further token can save, where drafting half a step for
        nothing costs more than a pass of the target.
        """
        config, cost = self.config, self.config.draft_cost
        return (
            config.method == "specguard"
            and config.num_candidates == 1
            and config.verifier.asks_target
            and config.verifier.can_only_fall
            and config.verifier.threshold > 0
            and cost is not None
            and cost.candidate * TYPICAL_STEP / 2 > cost.verification
            and not is_reference()
        )

    async def propose_and_read(self) -> StepState:
        """One candidate, drafted and read part by part, as long as it may still pass."""
        decode, pieces_of = self.context.tokenizer.decode, self.context.pieces_of
        candidate, seen, is_whole = await self._next_part(())
        num_passes = 1
        while True:
            verdict = verify(seen, None, 1.0, pieces_of(candidate), self.config.verifier)
            if is_whole or not verdict.is_accepted:
                break
            part, more, is_whole = await self._next_part(candidate.token_ids)
            text = decode(candidate.token_ids + part.token_ids)
            candidate, seen = joined(candidate, part, text), both_seen(seen, more)
            num_passes += 1
        if capture := self.context.capture(self.config.verifier):  # for a detailed record alone
            [whole] = await self.context.score("target", [candidate.token_ids], capture)
            seen = replace(seen, blocks=whole.blocks)
            verdict = verify(seen, capture, 1.0, pieces_of(candidate), self.config.verifier)
        return StepState(
            [candidate],
            selection=Selection(0, (1.0,)),
            verdict=verdict,
            readings=[(candidate, seen)],
            observation=seen,
            num_passes=num_passes,
            is_given_up=not is_whole,
        )

    async def _next_part(self, drafted: tuple[int, ...]) -> tuple[Candidate, Observation, bool]:
        """More of a step that is begun, what the target says of it, and whether that is its end."""
        with self.recorder.phase("propose"):
            part, is_whole = await self.context.draft_on(
                self.config.step_sampling, drafted, self._most_unread, LEAST_CONFIDENCE
            )
        with self.recorder.phase("verify"):
            [seen] = await self.context.score(
                "target", [part.token_ids], choices=self._wants_choices, drafted=drafted
            )
        return part, seen, is_whole

    async def propose(self) -> StepState:
        """The draft's candidates for the next step: a few first, if so wished, then the others."""
        config = self.config
        first = config.num_first_candidates or config.num_candidates
        num_further = config.num_candidates - first
        draw = partial(
            self.context.generate,
            "draft",
            config.step_sampling,
            embeddings=self._needs_embeddings,
        )
        with self.recorder.phase("propose"):
            candidates = await draw(first)
            if num_further and len(distinct(candidates)) > 1:
                candidates += await draw(num_further, first_candidate=first)
                num_further = 0
        return StepState(candidates, num_spared=num_further)

    async def select(self, step: StepState) -> None:
        """The most consistent candidate, or the one that the target scores highest."""
        with self.recorder.phase("select"):
            selection = step.selection = select_medoid(step.candidates, self._embed)
            alternatives = distinct(step.candidates)
        asks_target = self.config.selector == TARGET_SELECTOR and self.config.method == "specguard"
        if not asks_target or len(alternatives) == 1:
            return
        with self.recorder.phase("verify"):
            candidates = [step.candidates[index] for index in alternatives]
            capture, observations = await self._observe(candidates)
            for index, seen in zip(alternatives, observations, strict=True):
                step.verdicts[index] = verify(
                    seen,
                    capture,
                    selection.similarities[index],
                    self.context.pieces_of(step.candidates[index]),
                    self.config.verifier,
                )
            best = best_verdict(step.verdicts)
            step.readings = list(zip(candidates, observations, strict=True))
            step.observation = observations[alternatives.index(best)]
            step.selection = replace(selection, index=best)

    async def verify(self, step: StepState) -> None:
        """Judge the selected candidate."""
        assert step.selection is not None
        verifier, selected = self.config.verifier, step.selected
        if step.verdicts:
            step.verdict = step.verdicts[step.selection.index]
            return
        with self.recorder.phase("verify"):
            if self._reward is not None:
                texts = [record.text for record in self.recorder.steps]
                rewards = await self._reward.rewards(self, self.problem, [*texts, selected.text])
                step.verdict = by_reward(rewards[-1], self.config.reward_threshold)
                return
            if verifier.needs_attention or verifier.asks_target:
                await self._read(step)
                return
            seen, pieces = _own_observation(selected), self.context.pieces_of(selected)
            step.verdict = verify(seen, None, step.similarity, pieces, verifier)

    async def _read(self, step: StepState) -> None:
        """Have the verifying model read the selected candidate, and judge it by what it sees."""
        verifier, selected = self.config.verifier, step.selected
        capture, [seen] = await self._observe([selected])
        step.observation = seen
        if verifier.model == "target":
            step.readings = [(selected, seen)]
        pieces = self.context.pieces_of(selected)
        step.verdict = verify(seen, capture, step.similarity, pieces, verifier)

    async def _observe(
        self, candidates: list[Candidate]
    ) -> tuple[Capture | None, list[Observation]]:
        verifier = self.config.verifier
        capture = self.context.capture(verifier)
        token_ids = [candidate.token_ids for candidate in candidates]
        wants_choices = self._wants_choices and verifier.model == "target"
        return capture, await self.context.score(
            verifier.model, token_ids, capture, choices=wants_choices
        )

    @property
    def _wants_choices(self) -> bool:
        """Whether a rewrite can begin with what the target would have written."""
        is_kept = self.config.rewrite_sampling.is_greedy and not is_reference()
        return self._knows_choices and is_kept

    def accept(self, step: StepState) -> StepRecord:
        """Keep the draft's step."""
        self.context.append(step.selected.token_ids)
        if step.readings:
            self.context.knows("target")
        return self._judged("accepted", WrittenStep.of(step.selected), step)

    async def rewrite(self, step: StepState) -> StepRecord:
        """Have the target write the step, from where it would have written otherwise."""
        with self.recorder.phase("rewrite"):
            beginning, is_whole = self._beginning(step)
            self.context.append(beginning.token_ids)
            self.context.announcer.tokens("target", 0, beginning.token_ids)
            if step.readings:
                self.context.knows("target")
            written = beginning
            if not is_whole:
                written = _joined(beginning, await self._write_on(beginning.token_ids))
        return self._judged("rewritten", written, step)

    def _beginning(self, step: StepState) -> tuple[WrittenStep, bool]:
        """What a rewrite begins with, and whether that is all of it.

        Of all that the target has read, these are the tokens that it found most probable, one after
        the other, and its own choice in the place of the first that it did not: a greedy rewrite
        would only write them again.
        """
        if not (step.readings and self.config.rewrite_sampling.is_greedy) or is_reference():
            return WrittenStep((), "length"), False
        candidate, seen = max(step.readings, key=lambda reading: reading[1].num_leading_choices)
        n = seen.num_leading_choices
        kept = candidate.token_ids[:n]
        if n == len(candidate.token_ids) and not step.is_given_up:
            return WrittenStep(kept, candidate.finish, num_reused=n), True
        finish = None
        if seen.choices is not None:
            reader = self.context.reader()
            kept += (seen.choices[n],)
            for token_id in kept:
                finish = reader.feed(token_id)
        return WrittenStep(kept, finish or "length", num_reused=n), finish is not None

    async def write_alone(self) -> StepRecord:
        """The next step by one model, nothing judging it; "sd" lets the draft guess tokens."""
        recorder, method = self.recorder, self.config.method
        if self.config.is_stepwise:
            self.fallback.saw_plain()
            with recorder.phase("rewrite"):
                written = await self._write_on()
            return recorder.record("plain", "target", written, is_fallback=True)
        if method == "sd":
            sampling = self.config.step_sampling
            with recorder.phase("rewrite"):
                written = await write_by_guesses(self.context, sampling, self.lookahead)
            return recorder.record("plain", "target", written)
        author: Author = "target" if method == "target" else "draft"
        with recorder.phase("propose"):
            candidate = await self._write(author, self.config.step_sampling)
        step = StepState([candidate]) if author == "draft" else None
        return recorder.record("plain", author, WrittenStep.of(candidate), step)

    async def _write_on(self, begun: tuple[int, ...] = ()) -> WrittenStep:
        """A step by the target, or the rest of a begun one; the draft may guess its tokens."""
        sampling = self.config.rewrite_sampling
        is_guessed = self.lookahead.num_ahead > 0
        if is_guessed:
            written = await write_by_guesses(self.context, sampling, self.lookahead, begun)
        else:
            written = WrittenStep.of(await self._write("target", sampling, begun))
        self.fallback.pace = self.lookahead.pace
        if not is_guessed:
            self.lookahead.rest()
        return written

    async def _write(
        self, author: Author, sampling: Sampling, begun: tuple[int, ...] = ()
    ) -> Candidate:
        [candidate] = await self.context.generate(author, sampling, begun=begun)
        self.context.append(candidate.token_ids)
        self.context.knows(author)
        return candidate

    def _judged(self, decision: Decision, written: WrittenStep, step: StepState) -> StepRecord:
        author: Author = "target" if decision == "rewritten" else "draft"
        record = self.recorder.record(decision, author, written, step)
        num_longest = max(len(candidate.token_ids) for candidate in step.candidates)
        num_written = record.num_tokens - record.num_reused
        self.fallback.saw_drafted(
            num_candidates=len(step.candidates),
            num_longest=num_longest,
            num_read=sum(len(candidate.token_ids) for candidate in step.verified),
            num_tokens=record.num_tokens,
            num_rewritten=num_written if decision == "rewritten" else 0,
            num_passes=step.num_passes,
        )
        return record


def fallback_for(config: SolveConfig) -> Fallback:
    """What watches whether drafting pays; plain methods have nothing to fall back from."""
    num_candidates = config.num_first_candidates or config.num_candidates
    num_verified = num_candidates if config.selector == TARGET_SELECTOR else 1
    cost = config.draft_cost if config.is_stepwise else None
    return Fallback(cost, num_candidates, num_verified)


def _own_observation(candidate: Candidate) -> Observation:
    """What the draft said of its candidate while it drew it; first choices are not known."""
    unknown = np.zeros(len(candidate.token_ids), dtype=np.bool_)
    return Observation(candidate.token_logprobs, unknown, candidate.token_entropies)


def _joined(beginning: WrittenStep, rest: WrittenStep) -> WrittenStep:
    """A step of two parts, which the target has read and written."""
    return WrittenStep(
        beginning.token_ids + rest.token_ids,
        rest.finish,
        num_guessed=rest.num_guessed,
        num_kept=rest.num_kept,
        num_reused=beginning.num_reused,
    )

"""Timings of the engines' verbs with one problem's real prompt, prefixes and candidates.

Knows no backend and nothing of the step loop: the walk goes along the target's greedy steps.
"""

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from statistics import fmean, median
from typing import TypeVar

from specguard.core import (
    GREEDY,
    Boundary,
    Candidate,
    Capture,
    Engine,
    Prompt,
    Sampling,
    SolveConfig,
)
from specguard.core.config import TARGET_SELECTOR
from specguard.core.selector import distinct
from specguard.costs.side import Clock, Side

NUM_ROUNDS = 3  # of a timing that can be taken again; the median counts
_FEW = 8  # tokens of a turn that only comes between
Key = tuple[str, str, int]  # model, what, number of candidates
R = TypeVar("R")


class Timings:
    """Seconds, and the tokens that they were spent on, by model, what was done, and candidates."""

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._timings: dict[Key, list[tuple[float, int]]] = {}

    async def timed(self, work: Awaitable[R]) -> tuple[float, R]:
        """The seconds that something takes, not kept yet, and what comes of it."""
        started = self._clock()
        result = await work
        return self._clock() - started, result

    def add(self, key: Key, seconds: float, num_tokens: int) -> None:
        """One more timing."""
        self._timings.setdefault(key, []).append((seconds, num_tokens))

    def __iter__(self) -> Iterator[Key]:
        return iter(self._timings)

    def seconds(self, key: Key) -> float:
        """The mean of them; 0 for what was never done."""
        return fmean(seconds for seconds, _ in self._timings[key]) if key in self._timings else 0.0

    def tokens(self, key: Key) -> float:
        """The mean number of tokens."""
        return fmean(num_tokens for _, num_tokens in self._timings[key])


async def walk(
    draft: Engine,
    target: Engine,
    problem: str,
    configs: Mapping[int, SolveConfig],
    num_steps: int,
    clock: Clock = time.perf_counter,
) -> Timings:
    """Time the verbs of both engines along the first ``num_steps`` greedy steps of the target.

    At every step the draft draws k candidates for each of ``configs``; then both go on with the
    target's step. They take turns as in a solution: what is timed comes after work of the other
    model, which pushes this one's weights out of a processor's cache. Decode steps of the target
    do not: there they follow its own reading of the step. Timed in seconds, as the median of a few
    rounds where that can be:

    - ``prefill``: reading the prompt and drawing one token;
    - ``decode``, at three of the steps: a decode step of each model for k candidates, none of which
      ends. It is what `Engine.generate` takes to m tokens less what it takes to one, over m - 1,
      with m the longest candidate of the draft. What a job takes once, whatever its length, is not
      in it; a cold cache is;
    - ``read`` and ``read captured``: scoring the target's step without and with attention;
    - ``score``: one pass over the k candidates, without attention;
    - ``verify`` k: the pass that verifies in the target, over the candidates that differ where the
      target selects, else over one; with attention where the verifier weighs a signal of it.
    """
    config = next(iter(configs.values()))
    prompt = target.tokenizer.encode_prompt(problem, config.system_prompt, config.thinking)
    timings = Timings(clock)
    drafting = _Side("draft", draft, prompt, timings)
    judging = _Side("target", target, prompt, timings)
    sides = drafting, judging
    try:
        for side in sides:
            await side.time_prefill()
        drafting.before_timing, judging.before_timing = judging.read_a_little, drafting.draw
        # A few steps over the whole length: the time grows with the context.
        decoding = {num_steps * part // 4 for part in (1, 2, 3)}
        decoded = {
            1: replace(config, num_candidates=1),
            **configs,
        }  # one row is what both compare to
        for index in range(num_steps):
            cap = min(config.max_step_tokens, *(side.room for side in sides))
            boundary = Boundary(config.delimiter, target.tokenizer.eos_ids, cap)
            for count, settings in configs.items():
                candidates = await drafting.generate(count, settings.step_sampling, boundary)
                for side in sides:
                    await side.time_score(candidates)
                await judging.time_verify(candidates, settings)
            if index in decoding and cap > 1:
                longest = max(len(candidate.token_ids) for candidate in candidates)
                num_tokens = min(cap, max(2, longest))
                for count, settings in decoded.items():
                    sampling = settings.step_sampling
                    await drafting.time_decode(count, sampling, num_tokens)
                    rewriting = sampling if count > 1 else GREEDY
                    await judging.time_decode(count, rewriting, num_tokens, takes_turns=False)
            [step] = await judging.generate(1, GREEDY, boundary)
            for side in sides:
                await side.time_read(step.token_ids, config)
                side.token_ids += step.token_ids
        for side in sides:
            side.add_decode_steps()
    finally:
        for side in sides:
            side.release()
    return timings


class _Side(Side):
    """One side of the pair, and what it takes."""

    def __init__(self, role: str, engine: Engine, prompt: Prompt, timings: Timings) -> None:
        super().__init__(engine, prompt)
        self.role, self.timings = role, timings
        self.before_timing: Callable[[], Awaitable[None]] | None = None  # the other model's turn
        self._decode_steps: dict[int, list[float]] = {}

    async def draw(self) -> None:
        """Work of a draft's kind: a few decode steps."""
        if self.room:
            await self.write(1, GREEDY, min(_FEW, self.room))

    async def read_a_little(self) -> None:
        """Work of a verifier's kind: a pass over a few tokens."""
        if self.room:
            await self.score([self.token_ids[-min(_FEW, self.room) :]])

    async def _timed(self, work: Awaitable[R]) -> tuple[float, R]:
        if self.before_timing is not None:
            await self.before_timing()
        return await self.timings.timed(work)

    async def time_prefill(self) -> None:
        seconds, _ = await self.timings.timed(self.write(1, GREEDY, 1))
        self.timings.add((self.role, "prefill", 1), seconds, len(self.token_ids))

    async def time_decode(
        self, count: int, sampling: Sampling, num_tokens: int, takes_turns: bool = True
    ) -> None:
        timed = self._timed if takes_turns else self.timings.timed
        for _ in range(NUM_ROUNDS):
            whole, _ = await timed(self.write(count, sampling, num_tokens))
            first, _ = await self.timings.timed(self.write(count, sampling, 1))
            self._decode_steps.setdefault(count, []).append((whole - first) / (num_tokens - 1))

    def add_decode_steps(self) -> None:
        """The median of all decode steps counts: they are of one kind, but for the context."""
        for count, steps in self._decode_steps.items():
            self.timings.add((self.role, "decode", count), median(steps), count)

    async def time_score(self, candidates: list[Candidate]) -> None:
        token_ids = [candidate.token_ids for candidate in candidates]
        await self._time_scoring("score", len(token_ids), token_ids)

    async def time_verify(self, candidates: list[Candidate], settings: SolveConfig) -> None:
        verifier = settings.verifier
        capture = self.capture(settings) if verifier.needs_attention else None
        token_ids = [candidates[index].token_ids for index in distinct(candidates)]
        if settings.selector != TARGET_SELECTOR:
            del token_ids[1:]
        if verifier.needs_model:
            await self._time_scoring("verify", len(candidates), token_ids, capture)

    async def time_read(self, token_ids: tuple[int, ...], config: SolveConfig) -> None:
        """Score the tokens with attention, then without."""
        if "attention" in self.engine.features:
            await self._time_scoring("read captured", 1, [token_ids], self.capture(config))
        await self._time_scoring("read", 1, [token_ids])

    async def _time_scoring(
        self,
        what: str,
        count: int,
        token_ids: list[tuple[int, ...]],
        capture: Capture | None = None,
    ) -> None:
        rounds = [(await self._timed(self.score(token_ids, capture)))[0] for _ in range(NUM_ROUNDS)]
        self.timings.add((self.role, what, count), median(rounds), sum(map(len, token_ids)))

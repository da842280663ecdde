"""A few seconds' measurement of what drafting costs, through the seam alone.

Both models take turns as in a solution of a short problem: candidates are drawn, the target reads a
step, and writes one itself. Knows no backend and no file, so that it serves every engine, one at
the other end of a wire included.
"""

import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

from specguard.core.config import TARGET_SELECTOR, SolveConfig
from specguard.core.engine import GREEDY, Boundary, Candidate, Engine, Sampling
from specguard.core.errors import SpecguardError
from specguard.core.fallback import TYPICAL_STEP, DraftCost
from specguard.core.pairing import Pair
from specguard.core.reward import RewardModel
from specguard.core.text import final_answer
from specguard.costs.side import Clock, Side

# Every pair can write steps of it. The number differs, so that no text is met twice.
PROBLEM = "Mia has {} shells. Mia finds 9 more shells. How many shells does Mia have?"
SHORT_STEP = 8  # tokens of the shorter of the two steps that are read
NUM_ROWS = 4  # candidates drawn at once, at least: what a further one costs is always known
_MOST_ROUNDS = 12
_SECONDS, _MOST_SECONDS = 1.0, 8.0  # of all rounds; the second one where times vary
_STEADY = 1.5  # times the least: what a time may take to count as reached once more
_ROUND_SECONDS = 1.5  # in which each model writes its tokens once
_FEWEST_TOKENS = 2

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Measurement:
    """What drafting costs here, and the seconds of each thing that was timed.

    It ``is_steady`` where every time was reached twice: else the machine is busy with other things.
    """

    cost: DraftCost
    seconds: dict[str, float]
    is_steady: bool = True


async def measure(pair: Pair, config: SolveConfig, clock: Clock = time.perf_counter) -> Measurement:
    """Measure what a draft costs under these settings.

    Takes about a second where passes take milliseconds, and two rounds where they take long. Of
    each time the least counts that was reached twice: first calls allocate and compile, and a
    machine has other things to do.

    Raises:
        SpecguardError: the clock is too coarse, the context window too short, or a job failed.
    """
    assert pair.draft is not None
    assert pair.target is not None
    rounds = _Rounds(pair.draft, pair.target, pair.reward, config, clock)
    try:
        await rounds.run()
    finally:
        rounds.release()
    seconds = {**rounds.seconds, "all": rounds.spent}
    return Measurement(rounds.cost(), seconds, rounds.is_steady)


class _Rounds:
    """Rounds of work that both models do in turns, and the time of each part."""

    def __init__(
        self,
        draft: Engine,
        target: Engine,
        reward: RewardModel | None,
        config: SolveConfig,
        clock: Clock,
    ) -> None:
        self._engines = draft, target
        self._reward = reward if config.method == "rsd" else None
        self._config, self._clock = config, clock
        self._num_problems = 0
        self._pose()
        self._num_rows = max(NUM_ROWS, config.num_candidates)
        self._num_read = config.num_candidates if config.selector == TARGET_SELECTOR else 1
        self._timings: dict[str, list[float]] = {}
        self.spent = 0.0

    def _pose(self) -> None:
        """Begin with another problem."""
        config, target = self._config, self._engines[1]
        self._num_problems += 1
        self._problem = PROBLEM.format(10 + self._num_problems)
        self._texts: list[str] = []
        prompt = target.tokenizer.encode_prompt(
            self._problem, config.system_prompt, config.thinking
        )
        self._draft, self._target = (Side(engine, prompt) for engine in self._engines)

    async def run(self) -> None:
        """Two rounds at least, and more as long as they are short or differ."""
        began = self._clock()
        await self._read_prompt()
        pace = 0.0
        for side in self._draft, self._target:
            pace += (await self._timed(side.write(1, GREEDY, _FEWEST_TOKENS)))[0] / _FEWEST_TOKENS
        num_tokens = int(min(TYPICAL_STEP, max(_FEWEST_TOKENS, _ROUND_SECONDS / max(pace, 1e-9))))
        started = self._clock()
        for count in range(_MOST_ROUNDS):
            if count > 1:
                limit = _SECONDS if self.is_steady else _MOST_SECONDS
                if self._clock() - started > limit:
                    break
            if min(self._draft.room, self._target.room) < TYPICAL_STEP + num_tokens:
                if count < 2:
                    raise SpecguardError("the context window is too short to measure in")
                break
            await self._round(num_tokens)
        self.spent = self._clock() - began

    async def _read_prompt(self) -> None:
        for side in self._draft, self._target:
            await side.write(1, GREEDY, 1)  # first calls allocate and compile, too

    async def _round(self, num_tokens: int) -> None:
        config, draft, target = self._config, self._draft, self._target
        single = config.step_sampling
        several = Sampling() if single.is_greedy else single
        if self._texts:
            await draft.write(1, GREEDY, 1)  # reads what the target wrote, which is no draft's work
        num_rows = self._num_rows
        candidates = await self._write("draft, all rows", draft, num_rows, several, num_tokens)
        steps = [self._step(candidates[index], index) for index in range(self._num_read)]
        await self._read("long", steps)
        await self._write("draft", draft, 1, single, num_tokens)
        await self._read("short", [tuple(reversed(steps[0]))[:SHORT_STEP]])
        [written] = await self._write("target", target, 1, GREEDY, num_tokens)
        self._texts.append(written.text)
        for side in draft, target:
            side.token_ids += written.token_ids
        if written.finish == "eos" or final_answer("".join(self._texts)) is not None:
            self.release()
            self._pose()
            await self._read_prompt()

    async def _write(
        self, name: str, side: Side, count: int, sampling: Sampling, num_tokens: int
    ) -> list[Candidate]:
        boundary = Boundary(
            self._config.delimiter, self._target.engine.tokenizer.eos_ids, num_tokens
        )
        seconds, candidates = await self._timed(side.generate(count, sampling, boundary))
        self._keep(name, seconds / max(len(found.token_ids) for found in candidates))
        return candidates

    async def _read(self, name: str, steps: list[tuple[int, ...]]) -> None:
        """Steps read by the target, and by what else verifies."""
        config, verifier = self._config, self._config.verifier
        for role, side in ("target", self._target), ("draft", self._draft):
            reads_attention = verifier.model == role and verifier.needs_attention
            if role == "target" or (config.method == "specguard" and reads_attention):
                capture = side.capture(config) if reads_attention else None
                seconds, _ = await self._timed(side.score(steps, capture))
                self._keep(f"{role} reads {name}", seconds)
        if self._reward is not None:
            text = self._target.engine.tokenizer.decode(steps[0])
            judging = self._reward.rewards(self, self._problem, [*self._texts, text])
            self._keep(f"reward reads {name}", (await self._timed(judging))[0])

    def _step(self, candidate: Candidate, index: int) -> tuple[int, ...]:
        """A step of the usual length that begins with a candidate, no two of them the same."""
        text = self._target.prompt.token_ids * TYPICAL_STEP
        return (candidate.token_ids + text[index:])[:TYPICAL_STEP]

    async def _timed(self, work: Awaitable[R]) -> tuple[float, R]:
        started = self._clock()
        result = await work
        return self._clock() - started, result

    def _keep(self, name: str, seconds: float) -> None:
        self._timings.setdefault(name, []).append(seconds)

    @property
    def seconds(self) -> dict[str, float]:
        """Of a token that is written, and of a pass over a step."""
        return {name: sorted(timings)[1] for name, timings in self._timings.items()}

    @property
    def is_steady(self) -> bool:
        """Whether every time was reached twice."""
        return all(
            seconds <= _STEADY * min(self._timings[name]) for name, seconds in self.seconds.items()
        )

    def cost(self) -> DraftCost:
        """The figures in decode steps of the target.

        Where the target does not verify, it reads an accepted step later, together with others.
        """
        seconds = self.seconds
        token = seconds["target"]
        if token <= 0:
            raise SpecguardError("the clock is too coarse to measure by")
        rows = seconds["draft, all rows"]
        single = min(seconds["draft"], rows)  # one candidate takes no longer than several
        further = (rows - single) / (self._num_rows - 1)
        verification, reading = self._pass("target", self._num_read * TYPICAL_STEP)
        if self._config.method == "rsd":
            verification, more = self._pass("reward", TYPICAL_STEP)
            reading += more
        elif self._config.verifier.model == "draft" or not self._config.verifier.needs_model:
            verification, more = self._pass("draft", self._num_read * TYPICAL_STEP)
            reading += more
        parts = single, min(further, single), verification, reading
        return DraftCost(*(round(part / token, 4) for part in parts), source="measured")

    def _pass(self, reader: str, num_tokens: int) -> tuple[float, float]:
        """What a pass takes, and what each token adds: the line through the two that were timed."""
        seconds = self.seconds
        if f"{reader} reads long" not in seconds:
            return 0.0, 0.0
        long, short = (seconds[f"{reader} reads {name}"] for name in ("long", "short"))
        # A pass that grows by more than its tokens was held up by something else.
        long = min(long, short * num_tokens / SHORT_STEP)
        slope = max(0.0, (long - short) / (num_tokens - SHORT_STEP))
        return long - slope * num_tokens, slope

    def release(self) -> None:
        """Nothing of it stays in the engines."""
        for side in self._draft, self._target:
            side.release()
        if self._reward is not None:
            self._reward.release(self)

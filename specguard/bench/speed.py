"""Rates of a pair's models, what the cost model makes of them, and the time that solving takes.

Terms are measured by `specguard.bench.timing`, in which the step loop has no part: what it takes
beside them is what the comparison shows. Knows no backend.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

from specguard.bench.costs import Costs, Prefill, ideal_seconds, speed_up, speed_up_with_prefill
from specguard.bench.metered import Metered
from specguard.bench.timing import Key, Timings, walk
from specguard.core import GREEDY, Solver
from specguard.core.errors import SpecguardError, UsageError
from specguard.core.runner import Runner
from specguard.costs.side import Clock


@dataclass(frozen=True, slots=True)
class Measured:
    """One problem solved: wall seconds, those of them in the engines, counts.

    ``num_longest`` is the mean length of a step's longest candidate; ``prefill`` what reading the
    prompt takes the models that were used.
    """

    seconds: float
    in_models: float
    num_tokens: int
    num_steps: int
    num_rejected: int
    num_rewritten_tokens: int
    num_longest: float
    prefill: float = 0.0

    @property
    def token_seconds(self) -> float:
        """Seconds a token, the prompt's reading taken off."""
        return (self.seconds - self.prefill) / self.num_tokens


@dataclass(frozen=True, slots=True)
class Rate:
    """A verb of one model: median seconds of a pass over ``num_tokens`` tokens (all candidates)."""

    model: str
    what: str
    num_candidates: int
    num_tokens: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """One number of candidates: medians over problems.

    ``ideal`` and ``measured`` are seconds a token, prompts apart, and ``ratio`` the median of their
    ratio by problem. ``outside`` is the share of the time, prompts apart, that no model was at
    work. Speed-ups are over the target alone, without and with the reading of the prompt;
    ``predicted`` by acceptance rate of steps: at a given one rejected steps are as long as others,
    "measured" is what this run had.
    """

    num_candidates: int
    costs: Costs
    prefill: Prefill
    rejected: float
    ideal: float
    measured: float
    ratio: float
    outside: float
    predicted: Mapping[str, tuple[float, float]]
    speed_up: float
    speed_up_with_prefill: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Everything that was measured; ``target_ratio`` is of the target alone to its decode steps."""

    rates: tuple[Rate, ...]
    outcomes: tuple[Outcome, ...]
    num_problems: int
    target_seconds: float
    target_ratio: float


class SpeedRun:
    """Measures problem by problem: the terms, the target alone, each number of candidates in turn.

    Raises:
        UsageError: a model is missing, or the draft verifies: the cost model is of a target that
            does.
    """

    def __init__(
        self, solver: Solver, counts: Sequence[int], clock: Clock = time.perf_counter
    ) -> None:
        if solver.draft is None or solver.target is None:
            raise UsageError("a draft and a target are needed")
        if solver.config.verifier.model != "target":
            raise UsageError(
                "the cost model is of a target that verifies, and here the draft does",
                "choose a profile or a pair whose target verifies",
            )
        self._clock = clock
        self.draft, self.target = Metered(solver.draft, clock), Metered(solver.target, clock)
        # Every step is drafted: switching that off would hide what it costs.
        config = replace(solver.config, draft_cost=None)
        self.solver = Solver(self.draft, self.target, config)
        self.configs = {
            count: replace(config, method="specguard", num_candidates=count) for count in counts
        }
        self._timings: list[Timings] = []
        self._alone: list[Measured] = []
        self._solved: dict[int, list[Measured]] = {count: [] for count in counts}

    def warm_up(self, problem: str) -> None:
        """Do all of it once, for nothing: first calls allocate and compile."""
        alone = self._solve(problem, {"method": "target", "sampling": GREEDY})
        self._walk(problem, alone.num_steps)
        for count in self.configs:
            self._solve(problem, {"method": "specguard", "num_candidates": count})

    def add(self, problem: str) -> None:
        """Measure one problem."""
        alone = self._solve(problem, {"method": "target", "sampling": GREEDY})
        timings = self._walk(problem, alone.num_steps)
        prefill = {role: _prefill(timings, role) for role in ("draft", "target")}
        for count in self.configs:
            changes = {"method": "specguard", "num_candidates": count}
            solved = self._solve(problem, changes)
            self._solved[count].append(replace(solved, prefill=sum(prefill.values())))
        self._alone.append(replace(alone, prefill=prefill["target"]))
        self._timings.append(timings)

    def report(self, acceptances: Sequence[float]) -> Speed:
        """Medians over the problems so far.

        Raises:
            SpecguardError: there are none, or the clock or the machine was too coarse for them.
        """
        if not self._timings:
            raise SpecguardError("nothing was measured")
        keys = [key for key in self._timings[0] if key[1] != "verify"]
        decode: Key = ("target", "decode", 1)
        if not all(found.seconds(decode) > 0 for found in self._timings):
            raise SpecguardError(
                "a decode step of the target took no time that could be told",
                "measure with nothing beside it, and with longer steps",
            )
        return Speed(
            rates=tuple(
                Rate(
                    *key,
                    median(found.tokens(key) for found in self._timings),
                    median(found.seconds(key) for found in self._timings),
                )
                for key in keys
            ),
            outcomes=tuple(self._outcome(count, acceptances) for count in self.configs),
            num_problems=len(self._timings),
            target_seconds=median(one.token_seconds for one in self._alone),
            target_ratio=median(
                one.token_seconds / found.seconds(decode)
                for one, found in zip(self._alone, self._timings, strict=True)
            ),
        )

    def _outcome(self, count: int, acceptances: Sequence[float]) -> Outcome:
        solved = self._solved[count]
        rows = [
            (_costs(found, count, one), one.num_rejected / one.num_steps, one)
            for found, one in zip(self._timings, solved, strict=True)
        ]
        ideals = [ideal_seconds(costs, rejected) for costs, rejected, _ in rows]
        costs = Costs(
            *(
                median(getattr(found, name) for found, _, _ in rows)
                for name in Costs.__dataclass_fields__
            )
        )
        prefill = Prefill(
            *(
                median(_prefill(found, role) for found in self._timings)
                for role in ("draft", "target")
            )
        )
        num_tokens = median(one.num_tokens for one in solved)
        rejected = sum(one.num_rejected for one in solved) / sum(one.num_steps for one in solved)
        equal = replace(costs, num_rewritten=costs.num_tokens)
        cases = {f"{acceptance:g}": (equal, 1 - acceptance) for acceptance in acceptances}
        return Outcome(
            num_candidates=count,
            costs=costs,
            prefill=prefill,
            rejected=rejected,
            ideal=median(ideals),
            measured=median(one.token_seconds for one in solved),
            ratio=median(
                one.token_seconds / ideal for one, ideal in zip(solved, ideals, strict=True)
            ),
            outside=median(
                1 - (one.in_models - one.prefill) / (one.token_seconds * one.num_tokens)
                for one in solved
            ),
            predicted={
                name: (
                    speed_up(terms, share),
                    speed_up_with_prefill(terms, share, prefill, num_tokens),
                )
                for name, (terms, share) in {**cases, "measured": (costs, rejected)}.items()
            },
            speed_up=median(
                alone.token_seconds / one.token_seconds
                for alone, one in zip(self._alone, solved, strict=True)
            ),
            speed_up_with_prefill=median(
                (alone.seconds / alone.num_tokens) / (one.seconds / one.num_tokens)
                for alone, one in zip(self._alone, solved, strict=True)
            ),
        )

    def _solve(self, problem: str, changes: dict[str, Any]) -> Measured:
        self.draft.reset()
        self.target.reset()
        started = self._clock()
        solution = self.solver.solve(problem, **changes)
        seconds = self._clock() - started
        return Measured(
            seconds=seconds,
            in_models=sum(sum(engine.seconds.values()) for engine in (self.draft, self.target)),
            num_tokens=solution.stats.num_tokens,
            num_steps=solution.stats.num_steps,
            num_rejected=solution.stats.num_steps - solution.stats.num_accepted_steps,
            num_rewritten_tokens=solution.stats.num_target_tokens,
            num_longest=fmean(self.draft.longest) if self.draft.longest else 0.0,
        )

    def _walk(self, problem: str, num_steps: int) -> Timings:
        engines = self.draft.engine, self.target.engine
        with Runner() as runner:
            return runner.run(walk(*engines, problem, self.configs, num_steps, self._clock))


def _prefill(timings: Timings, role: str) -> float:
    """Reading the prompt, without the token that was drawn with it."""
    decode = timings.seconds((role, "decode", 1))
    return max(0.0, timings.seconds((role, "prefill", 1)) - decode)


def _costs(found: Timings, count: int, one: Measured) -> Costs:
    num_tokens = one.num_tokens / one.num_steps
    # A rewritten step is read in the pass that draws the next token.
    read = found.seconds(("draft", "read", 1))
    return Costs(
        draft_token=found.seconds(("draft", "decode", count)),
        target_token=found.seconds(("target", "decode", 1)),
        verify=found.seconds(("target", "verify", count)),
        catch_up=max(0.0, read - found.seconds(("draft", "decode", 1))),
        num_tokens=num_tokens,
        num_longest=one.num_longest,
        num_rewritten=(
            one.num_rewritten_tokens / one.num_rejected if one.num_rejected else num_tokens
        ),
    )

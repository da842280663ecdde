"""What drafting costs, measured on engines that take known times."""

import asyncio
from collections.abc import Hashable, Sequence
from typing import Any

import pytest

from specguard.core import Pair, SolveConfig, SpecguardError, VerifierConfig
from specguard.core.config import PRESETS
from specguard.costs.probe import PROBLEM, Measurement, measure
from tests.scripted import ALL_FEATURES
from tests.timed import Clock, Timed

LOG_PROB = VerifierConfig(weights={"log_prob": 1.0})
# In the target's decode steps of 0.01 s: a draft's token 0.4, a further candidate 0.05, a pass 2
# and 0.1 a token.
DRAFT = {"token": 0.004, "row": 0.0005, "pass_": 0.006, "read": 0.0002}
TARGET = {"token": 0.01, "row": 0.001, "pass_": 0.02, "read": 0.001}


def pair(
    clock: Clock, draft: dict[str, Any] = DRAFT, target: dict[str, Any] = TARGET, **more: Any
) -> Pair:
    return Pair(
        Timed("d", [], clock=clock, **draft, **more), Timed("t", [], clock=clock, **target, **more)
    )


def measured(engines: Pair, config: SolveConfig, clock: Clock) -> Measurement:
    return asyncio.run(measure(engines, config, clock))


def figures(measurement: Measurement) -> tuple[float, ...]:
    cost = measurement.cost
    return cost.candidate, cost.further, cost.verification, cost.reading


def test_the_figures_are_what_the_engines_take() -> None:
    clock = Clock()
    found = measured(pair(clock), SolveConfig(verifier=LOG_PROB), clock)
    assert figures(found) == pytest.approx((0.4, 0.05, 2.0, 0.1), abs=1e-3)
    assert found.cost.source == "measured"
    assert found.seconds["target"] == pytest.approx(0.01)
    assert found.seconds["all"] == pytest.approx(clock.now)


@pytest.mark.parametrize("num_candidates", [1, 3, 16])
def test_as_many_candidates_are_drawn_as_a_step_has(num_candidates: int) -> None:
    clock = Clock()
    engines = pair(clock)
    config = SolveConfig(num_candidates=num_candidates, selector="draft", verifier=LOG_PROB)
    found = measured(engines, config, clock)
    assert figures(found) == pytest.approx((0.4, 0.05, 2.0, 0.1), abs=1e-3)
    # What a further one costs is known where there is one, too.
    assert isinstance(engines.draft, Timed)
    rows = {job.num_candidates for job in engines.draft.generated}
    assert rows == {1, max(4, num_candidates)}


def test_a_target_that_selects_reads_all_candidates_in_a_pass() -> None:
    clock = Clock()
    engines = pair(clock)
    config = SolveConfig(num_candidates=6, selector="target", verifier=LOG_PROB)
    found = measured(engines, config, clock)
    assert figures(found) == pytest.approx((0.4, 0.05, 2.0, 0.1), abs=1e-3)
    assert isinstance(engines.target, Timed)
    assert {len(job.continuations) for job in engines.target.scored} == {1, 6}


def test_fast_pairs_are_measured_often_and_slow_ones_briefly() -> None:
    fast, slow = Clock(), Clock()
    times = {"token": 0.001, "pass_": 0.002}
    measured(pair(fast, times, times), SolveConfig(verifier=LOG_PROB), fast)
    assert fast.num_jobs > 50
    assert fast.now < 1.5
    # 3 seconds a token, as of a large model on a small machine.
    times = {"token": 3.0, "pass_": 6.0, "read": 0.03}
    found = measured(pair(slow, times, times), SolveConfig(verifier=LOG_PROB), slow)
    assert figures(found) == pytest.approx((1.0, 0.0, 2.0, 0.01), abs=1e-3)
    assert slow.num_jobs < 16
    assert slow.now < 40 * 3.0  # about what it takes to write one step of 30 tokens


@pytest.mark.parametrize("stalled", range(12))
def test_first_calls_and_stalls_do_not_count(stalled: int) -> None:
    clock = Clock({stalled: 0.5, stalled + 7: 0.3})
    found = measured(pair(clock), SolveConfig(verifier=LOG_PROB), clock)
    assert figures(found) == pytest.approx((0.4, 0.05, 2.0, 0.1), abs=1e-3)
    assert found.is_steady


def test_a_machine_that_is_busy_all_the_time_is_noticed() -> None:
    clock = Clock({job: 0.02 * 2**job for job in range(1, 99)})
    assert not measured(pair(clock), SolveConfig(verifier=LOG_PROB), clock).is_steady
    assert clock.num_jobs < 20
    steady = Clock({job: 0.001 * (job % 3) for job in range(99)})
    assert measured(pair(steady), SolveConfig(verifier=LOG_PROB), steady).is_steady


def test_stalls_make_nothing_dearer_than_can_be() -> None:
    times = {"token": 3.0, "row": 0.3, "pass_": 6.0, "read": 0.03}
    config = SolveConfig(verifier=LOG_PROB)
    for stalled in range(4, 9):
        clock = Clock({stalled: 200.0, stalled + 6: 200.0})
        cost = measured(pair(clock, times, times), config, clock).cost
        assert cost.candidate <= 1.3
        assert cost.further <= cost.candidate
        assert cost.of_step(1, 0, num_read=30) <= 30 / 8 * cost.of_step(1, 0, num_read=8)


def test_a_pass_that_costs_as_much_as_its_tokens_is_no_less_for_a_longer_step() -> None:
    """Compute is the limit: 13 decode steps for 30 tokens, 39 for 90."""
    clock = Clock()
    target = {"token": 0.01, "pass_": 0.0, "read": 0.13 / 30}
    cost = measured(pair(clock, target=target), SolveConfig(verifier=LOG_PROB), clock).cost
    assert cost.of_step(1, 0, num_read=30) == pytest.approx(13, abs=0.1)
    assert cost.of_step(1, 0, num_read=90) == pytest.approx(39, abs=0.1)


def test_a_pass_that_is_the_quicker_the_longer_it_is_costs_what_the_longer_takes() -> None:
    clock = Clock()
    target = {"token": 0.01, "pass_": 0.05, "read": -0.001}
    cost = measured(pair(clock, target=target), SolveConfig(verifier=LOG_PROB), clock).cost
    assert (cost.verification, cost.reading) == pytest.approx((2.0, 0.0))


def test_where_the_draft_verifies_the_target_reads_later() -> None:
    clock = Clock()
    engines = pair(clock)
    own = VerifierConfig("draft", {"log_prob": 1.0})
    found = measured(engines, SolveConfig(selector="draft", verifier=own), clock)
    assert figures(found) == pytest.approx((0.4, 0.05, 0.0, 0.1), abs=1e-3)
    assert isinstance(engines.draft, Timed)
    assert not engines.draft.scored
    grounded = VerifierConfig(**{**PRESETS["paper"], "model": "draft"})
    found = measured(engines, SolveConfig(selector="draft", verifier=grounded), clock)
    assert figures(found) == pytest.approx((0.4, 0.05, 0.6, 0.12), abs=1e-3)
    assert all(job.capture is not None for job in engines.draft.scored)


def test_attention_is_captured_where_it_weighs_something() -> None:
    clock = Clock()
    engines = pair(clock)
    measured(engines, SolveConfig(verifier=VerifierConfig(**PRESETS["paper"])), clock)
    assert isinstance(engines.target, Timed)
    assert all(job.capture is not None for job in engines.target.scored)
    plain = pair(clock, features=ALL_FEATURES - {"attention", "hidden states"})
    measured(plain, SolveConfig(verifier=LOG_PROB), clock)
    assert isinstance(plain.target, Timed)
    assert all(job.capture is None for job in plain.target.scored)


def test_without_a_verifier_nothing_is_verified() -> None:
    clock = Clock()
    unseen = VerifierConfig(weights={}, threshold=0.0)
    found = measured(pair(clock), SolveConfig(selector="draft", verifier=unseen), clock)
    assert figures(found) == pytest.approx((0.4, 0.05, 0.0, 0.1), abs=1e-3)


class Judge:
    """A reward model that takes its time."""

    name = "judge"

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.released: list[Hashable] = []

    async def rewards(self, key: Hashable, problem: str, steps: Sequence[str]) -> list[float]:
        self.clock.spend(0.03 + 0.002 * len(steps[-1]))
        return [1.0] * len(steps)

    def release(self, key: Hashable) -> None:
        self.released.append(key)


def test_a_reward_model_s_time_counts() -> None:
    clock = Clock()
    engines = pair(clock)
    judge = Judge(clock)
    engines = Pair(engines.draft, engines.target, judge)
    found = measured(engines, SolveConfig("rsd", selector="draft"), clock)
    assert figures(found) == pytest.approx((0.4, 0.05, 3.0, 0.3), abs=1e-3)
    assert len(judge.released) == 1


def test_short_steps_are_measured_by_what_was_written() -> None:
    clock = Clock()
    found = measured(pair(clock, longest=5), SolveConfig(verifier=LOG_PROB), clock)
    assert figures(found) == pytest.approx((0.4, 0.05, 2.0, 0.1), abs=1e-3)


def test_when_a_solution_ends_another_problem_begins() -> None:
    clock = Clock()
    engines = pair(clock, longest=5, ends=True)
    found = measured(engines, SolveConfig(verifier=LOG_PROB), clock)
    assert figures(found) == pytest.approx((0.4, 0.05, 2.0, 0.1), abs=1e-3)
    for engine in engines.draft, engines.target:
        assert isinstance(engine, Timed)
        assert not engine.held
        # No text is met twice: it would be read from a cache.
        scored = [(job.prefix, job.continuations) for job in engine.scored]
        assert len(set(scored)) == len(scored)
    assert isinstance(engines.target, Timed)
    assert len({job.prefix for job in engines.target.scored}) > 3


def test_nothing_stays_in_the_engines() -> None:
    clock = Clock()
    engines = pair(clock)
    measured(engines, SolveConfig(verifier=LOG_PROB), clock)
    for engine in engines.draft, engines.target:
        assert isinstance(engine, Timed)
        assert not engine.held
    failing = pair(clock, fail_at="score", error=SpecguardError("it is gone"))
    with pytest.raises(SpecguardError, match="it is gone"):
        measured(failing, SolveConfig(verifier=LOG_PROB), clock)
    for engine in failing.draft, failing.target:
        assert isinstance(engine, Timed)
        assert not engine.held


def test_a_short_window_is_measured_in_while_there_is_room() -> None:
    config = SolveConfig(verifier=LOG_PROB)
    clock = Clock()
    num_prompt = len(PROBLEM.format(11)) + 2
    found = measured(pair(clock, context_limit=num_prompt + 100), config, clock)
    assert figures(found) == pytest.approx((0.4, 0.05, 2.0, 0.1), abs=1e-3)
    with pytest.raises(SpecguardError, match="window is too short"):
        measured(pair(clock, context_limit=num_prompt + 50), config, clock)


def test_a_clock_that_stands_still_measures_nothing() -> None:
    with pytest.raises(SpecguardError, match="clock is too coarse"):
        measured(pair(Clock()), SolveConfig(verifier=LOG_PROB), Clock())

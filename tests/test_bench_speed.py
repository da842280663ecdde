"""``specguard bench speed``: the cost model's arithmetic, what is timed, what is printed."""

import asyncio
import json
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from specguard.bench.costs import Costs, Prefill, ideal_seconds, speed_up, speed_up_with_prefill
from specguard.bench.metered import Metered
from specguard.bench.speed import SpeedRun
from specguard.bench.tables import as_table
from specguard.bench.timing import Timings, walk
from specguard.cli.bench_speed import costs_table, rates_table, speed_ups_table
from specguard.cli.main import main
from specguard.core import (
    Candidate,
    Engine,
    GenerateJob,
    Observation,
    ScoreJob,
    SolveConfig,
    Solver,
    SpecguardError,
    UsageError,
    VerifierConfig,
)
from tests.reference import ReferenceEngine

# 24 draft steps of 2 s, 20 tokens a step: 2.4 s; a pass of 4 s: 0.2; rewriting 10 s and 1 / 20.
COSTS = Costs(
    draft_token=2.0,
    target_token=10.0,
    verify=4.0,
    catch_up=1.0,
    num_tokens=20.0,
    num_longest=24.0,
    num_rewritten=20.0,
)
SHORT = SolveConfig(max_tokens=40, max_step_tokens=8, num_candidates=2, selector="draft")
seconds = st.floats(1e-3, 1e3)
shares = st.floats(0, 1)


class Recorded(ReferenceEngine):
    """An engine that keeps the keys of its jobs."""

    def __init__(self, seed: int, **more: Any) -> None:
        super().__init__(seed, **more)
        self.keys: set[Hashable] = set()
        self.released: list[Hashable] = []

    async def generate(self, job: GenerateJob) -> list[Candidate]:
        self.keys.add(job.key)
        return await super().generate(job)

    async def score(self, job: ScoreJob) -> list[Observation]:
        self.keys.add(job.key)
        return await super().score(job)

    def release(self, key: Hashable) -> None:
        self.released.append(key)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_the_ideal_is_what_a_hand_computes() -> None:
    assert ideal_seconds(COSTS, 0.0) == pytest.approx(2.6)
    assert ideal_seconds(COSTS, 0.5) == pytest.approx(2.6 + 0.5 * 10.05)
    assert speed_up(COSTS, 0.0) == pytest.approx(10 / 2.6)
    longer = replace(COSTS, num_rewritten=30.0)
    assert ideal_seconds(longer, 0.5) == pytest.approx(2.6 + 0.5 * 15.05)
    # 100 tokens: 1000 s and a prompt of 5 s, against 260 s and prompts of 5 and 2 s.
    whole = speed_up_with_prefill(COSTS, 0.0, Prefill(2.0, 5.0), 100)
    assert whole == pytest.approx(1005 / 267)
    for share in -0.1, 1.1:
        with pytest.raises(ValueError, match="share"):
            ideal_seconds(COSTS, share)


@settings(deadline=None)  # a machine may be busy
@given(seconds, seconds, seconds, seconds, shares, shares)
def test_more_rejections_and_longer_passes_cost_more(
    draft: float, verify: float, catch_up: float, more: float, r: float, q: float
) -> None:
    costs = Costs(draft, 1.0, verify, catch_up, 10.0, 12.0, 10.0)
    low, high = sorted((r, q))
    assert ideal_seconds(costs, low) <= ideal_seconds(costs, high)
    slower = replace(costs, verify=verify + more)
    assert ideal_seconds(costs, r) <= ideal_seconds(slower, r)
    # All rejected, speculation costs what the target costs alone and the rest on top.
    assert ideal_seconds(costs, 1.0) >= costs.target_token
    assert speed_up_with_prefill(costs, r, Prefill(0, 0), 10) == pytest.approx(speed_up(costs, r))


@settings(deadline=None)  # a machine may be busy
@given(shares, seconds)
def test_a_free_draft_is_as_fast_as_rejections_allow(r: float, catch_up: float) -> None:
    free = Costs(0.0, 1.0, 0.0, 0.0, 10.0, 10.0, 10.0)
    assert ideal_seconds(free, r) == pytest.approx(r)
    assert ideal_seconds(replace(free, catch_up=catch_up), r) == pytest.approx(
        r + r * catch_up / 10
    )


def timed(
    configs: dict[int, SolveConfig], num_steps: int, context_limit: int = 512, **more: Any
) -> tuple[Timings, list[Recorded]]:
    """Timings of two engines, and what was asked of these."""
    engines = [Recorded(seed, context_limit=context_limit, **more) for seed in (0, 1)]
    return asyncio.run(walk(engines[0], engines[1], "a b", configs, num_steps)), engines


def test_every_verb_is_timed_as_the_configuration_uses_it() -> None:
    selecting = replace(SHORT, selector="target")
    timings, engines = timed({1: replace(selecting, num_candidates=1), 2: selecting}, 3)
    keys = set(timings)
    for role in "draft", "target":
        for key in ("prefill", 1), ("decode", 1), ("decode", 2), ("read", 1), ("score", 2):
            assert (role, *key) in keys
        assert (role, "read captured", 1) in keys
    assert {("target", "verify", 1), ("target", "verify", 2)} <= keys
    assert ("draft", "verify", 1) not in keys
    assert timings.tokens(("draft", "prefill", 1)) == 5
    assert timings.tokens(("target", "decode", 2)) == 2
    assert timings.seconds(("draft", "nothing", 1)) == 0
    # The target that selects reads all candidates that differ at once, else one.
    assert timings.tokens(("target", "verify", 2)) > timings.tokens(("target", "verify", 1))
    medoid, _ = timed({2: SHORT}, 3)
    assert medoid.tokens(("target", "verify", 2)) < timings.tokens(("target", "verify", 2))
    for engine in engines:
        assert len(engine.keys) == len(engine.released) == 1  # one problem, which is over


def test_what_an_engine_cannot_do_is_not_timed() -> None:
    lacks = dict.fromkeys(("attention", "hidden states"), "it has none")
    by_log_prob = replace(SHORT, verifier=VerifierConfig(weights={"log_prob": 1.0}))
    timings, _ = timed({2: by_log_prob}, 2, reasons=lacks)
    assert {("target", "verify", 2), ("draft", "read", 1)} <= set(timings)
    assert ("draft", "read captured", 1) not in set(timings)


@pytest.mark.parametrize("room", [1, 2, 5])
def test_verbs_are_timed_up_to_the_end_of_the_context(room: int) -> None:
    long = replace(SHORT, max_step_tokens=100, delimiter="~~~")
    timings, engines = timed({2: long}, 1, context_limit=5 + room)
    assert len(engines[0].tokenizer.encode_prompt("a b", None, False).token_ids) == 5
    assert timings.tokens(("target", "read", 1)) <= room


def test_timings_are_means() -> None:
    timings = Timings()
    timings.add(("draft", "read", 1), 1.0, 10)
    timings.add(("draft", "read", 1), 3.0, 20)
    assert timings.seconds(("draft", "read", 1)) == 2.0
    assert timings.tokens(("draft", "read", 1)) == 15


def test_a_metered_engine_changes_nothing_but_the_clock() -> None:
    draft, target = ReferenceEngine(0), ReferenceEngine(1)
    plain = Solver(draft, target, SHORT).solve("a b", detail=True)
    metered = Metered(draft), Metered(target)
    solution = Solver(*metered, SHORT).solve("a b", detail=True)
    assert solution.text == plain.text
    assert metered[0].seconds.keys() == {"generate"}
    assert "score" in metered[1].seconds
    spent = sum(sum(engine.seconds.values()) for engine in metered)
    assert 0 < spent <= solution.stats.seconds
    assert metered[0].longest == [
        max(len(candidate.token_ids) for candidate in step.candidates or ())
        for step in solution.steps
    ]
    sd = {"method": "sd", "num_speculated": 3}
    assert Solver(*metered, SHORT).solve("a", **sd).text == (
        Solver(draft, target, SHORT).solve("a", **sd).text
    )


def test_a_metered_engine_hides_nothing() -> None:
    engine = ReferenceEngine(0, reasons={"attention": "it has none"})
    metered = Metered(engine)
    for name in vars(Engine):
        if not name.startswith("_") and not callable(getattr(engine, name)):
            assert getattr(metered, name) == getattr(engine, name)


def test_a_run_compares_terms_and_time() -> None:
    measured = SpeedRun(Solver(ReferenceEngine(0), ReferenceEngine(1), SHORT), [1, 2])
    with pytest.raises(SpecguardError, match="nothing was measured"):
        measured.report([0.5])
    measured.warm_up("a b")
    for problem in "a b", "c d":
        measured.add(problem)
    speed = measured.report([0.5, 1.0])
    assert speed.num_problems == 2
    assert [outcome.num_candidates for outcome in speed.outcomes] == [1, 2]
    for outcome in speed.outcomes:
        assert outcome.predicted.keys() == {"0.5", "1", "measured"}
        assert outcome.predicted["0.5"][0] < outcome.predicted["1"][0]
        assert 0 <= outcome.rejected <= 1
        assert 0 <= outcome.outside < 1
        assert outcome.costs.num_longest <= SHORT.max_step_tokens
        assert outcome.ratio > 0
    for row in "| draft | decode | 2 | 2 |", "| target | prefill | 1 | 5 |":
        assert row in rates_table(speed)
    table = costs_table(speed)
    assert all(line.count("|") == table.splitlines()[0].count("|") for line in table.splitlines())
    assert "| target |  |" in table
    assert "predicted at 0.5 | predicted at 1 | predicted at measured | measured |" in (
        speed_ups_table(speed)
    )


def test_several_candidates_are_compared_to_a_single_row_all_the_same() -> None:
    measured = SpeedRun(Solver(ReferenceEngine(0), ReferenceEngine(1), SHORT), [2])
    measured.add("a b")
    speed = measured.report([0.5])
    assert [outcome.num_candidates for outcome in speed.outcomes] == [2]
    assert speed.target_ratio > 0
    for role in "draft", "target":
        assert f"| {role} | decode | 1 | 1 |" in rates_table(speed)


def test_a_clock_that_stands_still_measures_nothing() -> None:
    engines = ReferenceEngine(0), ReferenceEngine(1)
    measured = SpeedRun(Solver(*engines, SHORT), [1], clock=lambda: 0.0)
    measured.add("a b")
    with pytest.raises(SpecguardError, match="took no time that could be told"):
        measured.report([0.5])


def test_a_draft_that_verifies_is_refused() -> None:
    config = replace(SHORT, verifier=SHORT.verifier.asking("draft"), selector="draft")
    with pytest.raises(UsageError, match="target that verifies"):
        SpeedRun(Solver(ReferenceEngine(0), ReferenceEngine(1), config), [1])
    with pytest.raises(UsageError, match="a draft and a target"):
        SpeedRun(Solver(None, ReferenceEngine(1)), [1])


def test_json_is_printed() -> None:
    options = ("speed", "--models", "tiny", "--backend", "cpu", "--count", 1, "--acceptance", "0.7")
    result = run(*options, "--k", "1", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert {"machine", "rates", "outcomes", "target_ratio"} <= data.keys()
    [outcome] = data["outcomes"]
    assert outcome["num_candidates"] == 1
    assert outcome["predicted"].keys() == {"0.7", "measured"}
    assert data["machine"]["backend"] == "cpu"
    assert data["draft_cost"]["source"] == "measured"
    assert "measured in" in result.stderr


def test_a_legend_explains_the_tables() -> None:
    options = ("speed", "--models", "tiny", "--backend", "cpu", "--count", 1, "--k", "1")
    result = run(*options)
    assert result.exit_code == 0, result.output
    tables, legend = result.stdout.rsplit("|\n", 1)
    for column in "t_d(k)", "t_t", "v", "s", "n_max", "n_r", "ideal", "ratio", "outside models":
        assert column in tables
        assert column in legend


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["speed", "--k", "0"], "'--k': 0 is not in the range x>=1"),
        (["speed", "--k", "a"], "'--k': 'a' is not a valid integer"),
        (["speed", "--acceptance", "2"], "'--acceptance': 2.0 is not in the range"),
        (["speed", "--count", "0"], "--count"),
        (["--limit", "3", "speed"], "--limit stands before 'speed'"),
        ([], "Missing option '--output'"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str) -> None:
    result = run(*options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_table_is_markdown() -> None:
    assert as_table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"

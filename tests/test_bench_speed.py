"""``specguard bench speed``: the cost model's arithmetic, what is timed, what is printed."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from specguard.bench.context import VERBS, ContextLine, context_table, time_contexts
from specguard.bench.costs import Costs, Prefill, ideal_seconds, speed_up, speed_up_with_prefill
from specguard.bench.delegate import Delegate, Metered
from specguard.bench.speed import SpeedRun
from specguard.bench.tables import as_table
from specguard.bench.timing import Timings, walk
from specguard.cli.bench_speed import costs_table, rates_table, speed_ups_table
from specguard.cli.main import main
from specguard.core import Engine, SolveConfig, SpecguardError, UsageError, VerifierConfig
from tests.reference import ReferenceModel

# 24 draft steps of 2 s, 20 tokens a step: 2.4 s; passes of 4 s: 0.2; rewriting 10 s and 1 / 20.
COSTS = Costs(
    draft_token=2.0,
    target_token=10.0,
    verify=3.0,
    commit=1.0,
    catch_up=1.0,
    num_tokens=20.0,
    num_longest=24.0,
    num_rewritten=20.0,
)
SHORT = SolveConfig(max_tokens=40, max_step_tokens=8, num_candidates=2)
seconds = st.floats(1e-3, 1e3)
shares = st.floats(0, 1)


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
@given(seconds, seconds, seconds, seconds, seconds, shares, shares)
def test_more_rejections_and_longer_passes_cost_more(
    draft: float, verify: float, commit: float, catch_up: float, more: float, r: float, q: float
) -> None:
    costs = Costs(draft, 1.0, verify, commit, catch_up, 10.0, 12.0, 10.0)
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
    free = Costs(0.0, 1.0, 0.0, 0.0, 0.0, 10.0, 10.0, 10.0)
    assert ideal_seconds(free, r) == pytest.approx(r)
    assert ideal_seconds(replace(free, catch_up=catch_up), r) == pytest.approx(
        r + r * catch_up / 10
    )


def test_every_verb_is_timed_as_the_configuration_uses_it() -> None:
    draft, target = ReferenceModel(0), ReferenceModel(1)
    selecting = replace(SHORT, selector="target")
    found = walk(draft, target, "a b", {1: replace(selecting, num_candidates=1), 2: selecting}, 3)
    keys = set(found)
    for role in "draft", "target":
        for key in ("prefill", 1), ("decode", 1), ("decode", 2), ("extend", 1), ("score", 2):
            assert (role, *key) in keys
        assert (role, "extend captured", 1) in keys
        assert (role, "commit", 2) in keys
    assert ("target", "verify", 1) in keys
    assert ("draft", "verify", 1) not in keys
    assert ("target", "commit", 1) not in keys  # one candidate is read, not scored
    assert found.tokens(("draft", "prefill", 1)) == 4
    assert found.seconds(("draft", "nothing", 1)) == 0
    medoid = walk(draft, target, "a b", {2: SHORT}, 3)
    assert ("target", "commit", 2) not in set(medoid)


@pytest.mark.parametrize("room", [1, 2, 5])
def test_verbs_are_timed_up_to_the_end_of_the_context(room: int) -> None:
    class Short(Delegate):
        context_limit = 5 + room  # type: ignore[assignment]

    draft, target = Short(ReferenceModel(0)), Short(ReferenceModel(1))
    prompt = draft.tokenizer.encode_prompt("a b", None, False)
    assert len(prompt.token_ids) == 5
    long = replace(SHORT, max_step_tokens=100, delimiter="~~~")
    found = walk(draft, target, "a b", {2: long}, 1)
    assert found.tokens(("target", "extend", 1)) <= room


def test_timings_are_means() -> None:
    found = Timings()
    found.add(("draft", "extend", 1), 1.0, 10)
    found.add(("draft", "extend", 1), 3.0, 20)
    assert found.seconds(("draft", "extend", 1)) == 2.0
    assert found.tokens(("draft", "extend", 1)) == 15


def test_a_metered_model_changes_nothing_but_the_clock() -> None:
    draft, target = ReferenceModel(0), ReferenceModel(1)
    plain = Engine(draft, target, SHORT).solve("a b", detail=True)
    metered = Metered(Delegate(draft)), Metered(Delegate(target))
    solution = Engine(*metered, SHORT).solve("a b", detail=True)
    assert solution.text == plain.text
    assert {"start", "propose"} <= metered[0].seconds.keys()
    assert solution.stats.seconds >= sum(metered[0].seconds.values())
    assert metered[0].longest == [
        max(len(one.token_ids) for one in step.candidates or ()) for step in solution.steps
    ]
    sd = {"method": "sd", "num_speculated": 3}
    assert Engine(*metered, SHORT).solve("a", **sd).text == (
        Engine(draft, target, SHORT).solve("a", **sd).text
    )


def test_a_run_compares_terms_and_time() -> None:
    measured = SpeedRun(Engine(ReferenceModel(0), ReferenceModel(1), SHORT), [1, 2])
    with pytest.raises(SpecguardError, match="nothing was measured"):
        measured.report([0.5])
    measured.warm_up("a b")
    for problem in "a b", "c d":
        measured.add(problem)
    found = measured.report([0.5, 1.0])
    assert found.num_problems == 2
    assert [one.num_candidates for one in found.outcomes] == [1, 2]
    for one in found.outcomes:
        assert one.predicted.keys() == {"0.5", "1", "measured"}
        assert one.predicted["0.5"][0] < one.predicted["1"][0]
        assert 0 <= one.rejected <= 1
        assert 0 <= one.outside < 1
        assert one.costs.num_longest <= SHORT.max_step_tokens
        assert one.ratio > 0
    for row in "| draft | decode | 2 | 2 |", "| target | prefill | 1 | 4 |":
        assert row in rates_table(found)
    table = costs_table(found)
    assert all(line.count("|") == table.splitlines()[0].count("|") for line in table.splitlines())
    assert "| target |  |" in table
    assert "predicted at 0.5 | predicted at 1 | predicted at measured | measured |" in (
        speed_ups_table(found)
    )


def test_a_draft_that_verifies_is_refused() -> None:
    config = replace(SHORT, verifier=VerifierConfig(model="draft"))
    with pytest.raises(UsageError, match="target that verifies"):
        SpeedRun(Engine(ReferenceModel(0), ReferenceModel(1), config), [1])
    with pytest.raises(UsageError, match="a draft and a target"):
        SpeedRun(Engine(None, ReferenceModel(1)), [1])


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["speed", "--k", "0"], "--k must be at least 1"),
        (["speed", "--k", "a"], "--k must be numbers"),
        (["speed", "--acceptance", "2"], "--acceptance lies in"),
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


def test_contexts_are_timed_in_order_and_leave_room() -> None:
    model = ReferenceModel(0, vocab_size=256)
    lines = list(time_contexts(model, [80, 70], num_candidates=2, step_length=3, num_rounds=1))
    assert [line.length for line in lines] == [70, 80]
    for line in lines:
        assert line.seconds.keys() == set(VERBS)
        assert 0 < line.step_seconds < sum(line.seconds.values())
    table = context_table([ContextLine(1000, dict.fromkeys(VERBS, 0.001), 1.04)])
    assert "| 1000 | 1.00 |" in table
    assert "| 1.040 | 3.00 |  |" in table
    two = [ContextLine(n * 1000, dict.fromkeys(VERBS, n * 0.001), 1.0) for n in (1, 3)]
    assert context_table(two).endswith("| 9.00 | 3.000 |\n")
    for lengths in [10], [70, 511]:
        with pytest.raises(UsageError, match="contexts must lie"):
            list(time_contexts(model, lengths))

"""``benchmarks.peers``: replay is exact, random pairs load everywhere, the table has its rows."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

import benchmarks.peers as peers
from benchmarks.peers import Contender, Written, lines_table, race
from benchmarks.random_pair import random_pair, write_random_model
from benchmarks.replay import Schedule, replaying
from specguard import Solver, UsageError, load

PROBLEM = "What is 1 + 1?"
SMALL = (3, 64, 128)


@pytest.fixture(scope="module")
def sources() -> Iterator[tuple[str, str]]:
    with random_pair(*SMALL) as folders:
        yield folders


@pytest.fixture(scope="module")
def solver(sources: tuple[str, str]) -> Solver:
    return load(draft=sources[0], target=sources[1], backend="cpu", dtype="float32")


@settings(deadline=None)  # a machine may be busy
@given(st.integers(1, 30), st.integers(1, 40), st.floats(0, 1), st.integers(0, 9))
def test_a_schedule_has_the_wanted_acceptance_and_mean_length(
    num_steps: int, length: int, acceptance: float, seed: int
) -> None:
    schedule = Schedule.of(num_steps, length, acceptance, seed)
    assert len(schedule.lengths) == len(schedule.accepted) == num_steps
    assert sum(schedule.accepted) == round(num_steps * acceptance)
    assert schedule.num_tokens == len(schedule.accepted_tokens) == num_steps * length
    assert min(schedule.lengths) >= 1
    position = 0
    for index, own in enumerate(schedule.lengths):
        assert schedule.step_at(position) == schedule.step_at(position + own - 1) == index
        position += own


def test_impossible_schedules_and_shapes_are_refused(tmp_path: Any) -> None:
    for arguments in (0, 5, 0.5), (3, 0, 0.5), (3, 5, 1.5):
        with pytest.raises(UsageError, match="no schedule"):
            Schedule.of(*arguments)
    with pytest.raises(UsageError, match="multiple of 64"):
        write_random_model(tmp_path, 2, 100, 0)


@pytest.mark.parametrize("num_candidates", [1, 3])
def test_replay_takes_exactly_the_scheduled_steps(solver: Solver, num_candidates: int) -> None:
    schedule = Schedule.of(8, 6, 0.5, seed=3)
    solution = replaying(solver, schedule).solve(PROBLEM, num_candidates=num_candidates)
    assert tuple(step.num_tokens for step in solution.steps) == schedule.lengths
    assert tuple(step.is_accepted for step in solution.steps) == schedule.accepted
    assert solution.finish_reason == "length"
    drafted = [step.num_drafted for step in solution.steps]
    assert drafted == [num_candidates * length for length in schedule.lengths]
    plain = replaying(solver, schedule).solve(PROBLEM, method="target")
    assert (plain.stats.num_tokens, plain.finish_reason) == (48, "length")


def test_token_level_speculation_keeps_the_scheduled_tokens(solver: Solver) -> None:
    for acceptance in 0.0, 0.6, 1.0:
        schedule = Schedule.of(4, 10, acceptance)
        stats = replaying(solver, schedule, guesses=True).solve(PROBLEM, method="sd").stats
        assert stats.num_tokens == 40
        # A guess is kept where it and all before it in its block are accepted; behind them the
        # target writes one of its own.
        position = kept = 0
        while position < 40:
            block = schedule.accepted_tokens[position : position + 4]
            num_accepted = [*block, False].index(False)
            kept += num_accepted
            position += num_accepted + 1
        assert stats.num_kept_tokens == kept


def test_random_weights_are_the_same_for_every_library(sources: tuple[str, str]) -> None:
    pytest.importorskip("mlx_lm")
    texts = []
    for backend in "cpu", "mlx":
        solver = load(target=sources[1], backend=backend, dtype="float32", method="target")
        texts.append(solver.solve(PROBLEM, max_tokens=20).text)
    assert texts[0] == texts[1]


def test_a_race_compares_with_the_own_peer() -> None:
    def contender(library: str, text: str, **more: Any) -> Contender:
        return Contender(library, "generate", library, lambda problem: Written(text, 4), **more)

    contenders = [
        contender("transformers", "a", is_baseline=True, is_lossless=True),
        contender("mlx-lm", "b", is_lossless=True),
        contender("specguard", "a"),
    ]
    first, second, third = lines = race(contenders, ["x", "y"])
    assert (first.ratio, first.num_equal, first.num_problems) == (1.0, 2, 2)
    assert (second.ratio, second.num_equal) == (None, 0)
    assert (third.ratio, third.num_equal) == (None, None)
    table = lines_table(lines, ["mlx-lm"])
    assert "| mlx-lm | not installed |" in table
    assert table.count("\n") == 6


def run(*arguments: object) -> str:
    result = CliRunner().invoke(peers.main, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_missing_peer_is_named_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    table = run("--backend", "cpu", "--weights", "built-in", "--count", 1)
    for row in "| transformers | not installed |", "| specguard (cpu) | sd |", "| mlx-lm |":
        assert row in table


def test_peers_and_methods_stand_side_by_side() -> None:
    shape = ("--layers", 3, "--hidden", 128, "--draft-hidden", 64, "--tokens", 20)
    replay = ("--rounds", 1, "--k", 2, "--acceptance", 0.5)
    data = json.loads(run("--backend", "cpu", "--weights", "random", *shape, *replay, "--json"))
    [lines] = data["tables"].values()
    assert [line["method"] for line in lines] == ["generate", "target", "sd", "specguard, k = 2"]
    assert lines[0]["ratio"] == 1.0
    assert [line["acceptance"] for line in lines] == [None, None, 0.5, 0.5]
    assert {line["num_tokens"] for line in lines} == {32}
    assert "torch" in data["machine"]


def test_a_backend_without_a_peer_is_refused() -> None:
    with pytest.raises(UsageError, match="no peer runs"):
        peers.peer_of("vulkan")

"""Methods that draw several solutions, and problems that are solved side by side."""

import time
from collections.abc import Hashable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from specguard.bench import runner
from specguard.bench.datasets import DataSet, Item
from specguard.bench.grading import Grade, Grader
from specguard.bench.methods import choose_methods
from specguard.bench.report import summarise
from specguard.bench.runner import Run
from specguard.core import Sampling, SolveConfig, Solver, UsageError
from tests.reference import ReferenceEngine

BASE = SolveConfig(
    num_candidates=2, delimiter=" ", max_step_tokens=9, max_tokens=40, sampling=Sampling(2.0, 1.0)
)
DATA = DataSet("three", tuple(Item(f"{n}", f"problem {n}", "1") for n in range(3)))


def reward_of(step: str) -> float:
    return (sum(map(ord, step)) % 7 + 1) / 8


class Sums:
    """A reward model with a taste of its own, which remembers what it judged."""

    name = "sums"

    def __init__(self) -> None:
        self.judged: list[list[str]] = []
        self.open: set[Hashable] = set()

    async def rewards(self, key: Hashable, problem: str, steps: Sequence[str]) -> list[float]:
        self.open.add(key)
        self.judged.append(list(steps))
        return [reward_of(step) for step in steps]

    def release(self, key: Hashable) -> None:
        self.open.discard(key)


def judged_pair() -> tuple[Solver, Sums]:
    judge = Sums()
    return Solver(ReferenceEngine(1), ReferenceEngine(2), BASE, judge), judge


def rows(folder: Path, *names: str, batch_size: int = 1, seeds: Sequence[int] = (0,)) -> list[Any]:
    solver, judge = judged_pair()
    run = Run(solver, DATA, choose_methods(names, BASE), seeds, folder, "cpu", batch_size)
    try:
        list(run.rows_to_come())
        assert run.num_missing == len(run.rows)
    finally:
        run.close()
    assert judge.open == set()
    return run.rows


def facts(rows: list[Any]) -> list[Any]:
    names = ("method", "id", "seed", "answer", "num_samples", "num_tokens", "num_drafted_tokens")
    return sorted([row[name] if row[name] is not None else "" for name in names] for row in rows)


def test_a_batch_changes_no_row_but_its_times(tmp_path: Path) -> None:
    names = ("target", "draft-sampled", "paper@2", "majority-draft@3", "best-of-draft@3", "rsd")
    alone = rows(tmp_path / "alone", *names, seeds=(0, 1))
    together = rows(tmp_path / "together", *names, seeds=(0, 1), batch_size=4)
    assert facts(alone) == facts(together)
    for row in together:
        # Phases are those of the time that is counted, not of what a problem waited.
        assert sum(row["phase_seconds"].values()) <= row["seconds"] * 1.001


def test_times_of_a_batch_add_up_to_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver, _ = judged_pair()
    run = Run(solver, DATA, choose_methods(("paper@2",), BASE), range(3), tmp_path, "cpu", 4)
    grading = 0.0

    class SlowGrader(Grader):
        def grade(self, answer: str | None, gold: str) -> Grade:
            nonlocal grading
            grading += 0.05
            time.sleep(0.05)
            return Grade("different")

    monkeypatch.setattr(runner, "Grader", SlowGrader)
    started = time.perf_counter()
    solved = list(run.rows_to_come())
    wall = time.perf_counter() - started - grading
    run.close()
    assert len(solved) == 9
    total = sum(row["seconds"] for row in solved)
    assert 0.7 * wall < total <= wall
    assert min(row["seconds"] for row in solved) >= 0


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_problem_that_cannot_be_solved_does_not_end_the_run(
    batch_size: int, tmp_path: Path
) -> None:
    items = (DATA.items[0], Item("long", "x" * 600, "1"), DATA.items[1])
    methods = choose_methods(("target", "paper@2", "majority-draft@2"), BASE)
    solver, _ = judged_pair()
    run = Run(solver, DataSet("three", items), methods, (0,), tmp_path, "cpu", batch_size)
    solved = list(run.rows_to_come())
    run.close()
    assert len(solved) == 9
    for row in solved:
        assert (row["id"] == "long") == bool(row["errors"])
        assert row["id"] != "long" or (not row["is_right"] and "context window" in row["errors"][0])
    assert {line.num_problems for line in summarise(solved, (1, 2))} == {3}


def test_a_budget_without_room_for_a_problem_ends_the_run(tmp_path: Path) -> None:
    methods = choose_methods(("target",), BASE)
    run = Run(judged_pair()[0], DATA, methods, (0,), tmp_path, "cpu", 2, 100)
    with pytest.raises(UsageError, match="budget"):
        list(run.rows_to_come())
    run.close()
    assert run.rows == []


def test_no_two_samples_are_the_same_run(tmp_path: Path) -> None:
    solver, _ = judged_pair()
    seeds: list[object] = []
    solve = solver.solve

    def remembered(problem: str, **changes: Any) -> Any:
        seeds.append((problem, changes["seed"]))
        return solve(problem, **changes)

    solver.solve = remembered  # type: ignore[method-assign]
    methods = choose_methods(("majority-draft@4",), BASE)
    run = Run(solver, DATA, methods, (0, 1), tmp_path, "cpu")
    list(run.rows_to_come())
    run.close()
    assert len(set(seeds)) == len(seeds) == 3 * 2 * 4


def test_the_solution_with_the_best_steps_is_chosen(tmp_path: Path) -> None:
    solver, judge = judged_pair()
    methods = choose_methods(("best-of-target@5",), BASE)
    run = Run(solver, DATA, methods, (0,), tmp_path, "cpu")
    try:
        [method] = methods
        item = DATA.items[0]
        solutions = [
            replace(solver.solve(item.problem, **changes), answer_source="box")
            for changes in ({**method.changes, "seed": seed} for seed in range(5))
        ]
        chosen = run._chosen(item, method, solutions)
    finally:
        run.close()

    def product(solution: Any) -> float:
        return prod(reward_of(step.text) for step in solution.steps)

    assert chosen == max(solutions, key=product).answer
    assert len(judge.judged) == 5


@pytest.mark.parametrize(("time", "count"), [(5.2, 5), (5.7, 6), (0.1, 1), (1e9, 64)])
def test_samples_are_drawn_until_a_time_is_matched(time: float, count: int, tmp_path: Path) -> None:
    solver, _ = judged_pair()
    solve = solver.solve

    def timed(problem: str, **changes: Any) -> Any:
        solution = solve(problem, **changes)
        seconds = 1.0 if changes["method"] == "draft" else time
        return replace(solution, stats=replace(solution.stats, seconds=seconds))

    solver.solve = timed  # type: ignore[method-assign]
    methods = choose_methods(("target", "majority-draft@=target"), BASE)
    run = Run(solver, DataSet("one", DATA.items[:1]), methods, (0,), tmp_path, "cpu")
    _, matched = run.rows_to_come()
    run.close()
    assert matched["num_samples"] == count
    assert matched["seconds"] == pytest.approx(count, abs=0.5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("majority-draft@=specguard",), "named before it"),
        (("specguard", "target@=specguard"), "is no number"),
        (("rsd@4",), "no number of candidates"),
        (("specguard-adaptive@2",), "fewer"),
    ],
)
def test_counts_that_mean_nothing_are_refused(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_methods(names, BASE)


def test_reward_guided_decoding_judges_each_step_behind_those_that_stand() -> None:
    solver, judge = judged_pair()
    solution = solver.solve("p", method="rsd", num_candidates=1, reward_threshold=0.5)
    assert judge.open == set()
    assert len(judge.judged) == len(solution.steps)
    for step, judged in zip(solution.steps, judge.judged, strict=True):
        assert judged[:-1] == [before.text for before in solution.steps[: step.index]]
        drafted = step.text if step.draft_text is None else step.draft_text
        assert judged[-1] == drafted
        assert step.is_accepted == (reward_of(drafted) >= 0.5)
        assert step.signals == {"reward": step.scores["ensemble"]}
        assert step.threshold == 0.5
    assert {step.decision for step in solution.steps} == {"accepted", "rewritten"}
    with pytest.raises(UsageError, match="reward model"):
        Solver(solver.draft, solver.target, BASE).solve("p", method="rsd")

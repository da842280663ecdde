"""Two backends side by side: ``python -m benchmarks.measure --help``."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import click

from specguard import Solution, StepRecord, load
from specguard.bench.memory import peak_mebibytes
from specguard.bench.tables import as_table
from specguard.core import GREEDY
from specguard.core.config import PRESETS
from specguard.models.pairs import BUILT_IN_PAIR, find_pair
from specguard.models.tiny import problems


@click.group(context_settings={"show_default": True})
def main() -> None:
    """Measure backends on held-out problems of the built-in pair."""


@main.command()
@click.option("--count", default=100, help="Problems to solve.")
@click.option("--backends", "names", nargs=2, default=("cpu", "mlx"))
def compare(count: int, names: tuple[str, str]) -> None:
    """Solve problems on two backends in turn: equality of everything decided, time, memory.

    Solutions are equal where every token of every candidate, every decision and the finish reasons
    are. Others are listed, with the distance of both scores from the threshold.
    """
    solvers = [
        load(BUILT_IN_PAIR, backend=name, dtype="float32", draft_cost=None) for name in names
    ]
    paper = replace(find_pair(BUILT_IN_PAIR).verifier, **PRESETS["paper"])
    modes: dict[str, dict[str, Any]] = {
        "sampled": {"num_candidates": 8},
        "greedy": {"num_candidates": 8, "sampling": GREEDY},
        "preset paper": {"num_candidates": 8, "verifier": paper, "selector": "draft"},
        "target, greedy": {"method": "target"},
    }
    rows, differences = [], []
    for mode, settings in modes.items():
        pairs = []
        for number, problem in enumerate(_held_out(count)):
            first, second = (solver.solve(problem, detail=True, **settings) for solver in solvers)
            pairs.append((first, second))
            if decided(first) != decided(second):
                differences.append(f"{mode}, {number}: {_first_difference(first, second)}")
        num_equal = sum(decided(first) == decided(second) for first, second in pairs)
        cells = []
        for solutions in zip(*pairs, strict=True):
            seconds = sum(solution.stats.seconds for solution in solutions)
            num_tokens = sum(solution.stats.num_tokens for solution in solutions)
            cells += [f"{seconds / count:.3f}", f"{num_tokens / seconds:.0f}"]
        rows.append([mode, f"{num_equal} of {count}", *cells])
    heads = [head for name in names for head in (f"{name} s / problem", "tokens/s")]
    click.echo(as_table(["settings", "equal", *heads], rows))
    for line in differences:
        click.echo(line)
    for name in names:
        command = [sys.executable, "-m", "benchmarks.measure", "memory", "--backend", name]
        peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        click.echo(f"{name}: {peak}")


@main.command()
@click.option("--backend", default="mlx")
def memory(backend: str) -> None:
    """Memory of this process after loading, and its peak over ten problems."""
    import psutil

    solver = load(BUILT_IN_PAIR, backend=backend)
    loaded = psutil.Process().memory_info().rss / 2**20
    for problem in _held_out(10):
        solver.solve(problem)
    click.echo(f"{loaded:.0f} MiB resident once loaded, {peak_mebibytes():.0f} MiB at the peak")


def _held_out(count: int) -> Iterator[str]:
    return (problem.text for problem in islice(problems.stream(problems.HELD_OUT), count))


def decided(solution: Solution) -> tuple[Any, ...]:
    """All that was decided on the way to a solution, and no score."""
    return solution.text, solution.finish_reason, [_decided_step(step) for step in solution.steps]


def _decided_step(step: StepRecord) -> tuple[Any, ...]:
    return (
        step.decision,
        step.text,
        step.selected,
        step.tokens.token_ids if step.tokens else (),
        [(candidate.token_ids, candidate.finish) for candidate in step.candidates or ()],
    )


def _first_difference(first: Solution, second: Solution) -> str:
    for ours, theirs in zip(first.steps, second.steps, strict=False):
        if _decided_step(ours) != _decided_step(theirs):
            distances = [
                abs(step.scores["ensemble"] - step.threshold)
                for step in (ours, theirs)
                if step.threshold is not None
            ]
            return (
                f"step {ours.index}: {ours.decision} {ours.text!r}, {theirs.decision} "
                f"{theirs.text!r}; distances from the threshold {distances}"
            )
    return f"finish: {first.finish_reason}, {second.finish_reason}"


if __name__ == "__main__":
    main()

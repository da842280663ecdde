"""Problems by the thousand through `solve_many`: ``python -m benchmarks.reliability.soak --help``.

Mixed settings, side by side, and one problem in ten cancelled at a random moment: every result is
compared with the one that the problem has by itself, and the memory is looked at all along.
"""

import asyncio
import gc
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import click
import numpy as np
import psutil

from benchmarks.served import DRAFT_COST, texts
from specguard import load, solve_many
from specguard.core import DraftCost, Solution, Solver, SpecguardError, Task, solve_many_async

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"method": "target"},
    {"method": "draft"},
    {"num_candidates": 4},
    {"method": "sd"},
    {"num_candidates": 3, "selector": "ngram"},
    {"max_tokens": 9},
    {"num_candidates": 0},  # impossible: the outcome is an error
)


@dataclass(slots=True)
class Found:
    """What came of a run; ``memory`` is of this process, in MiB, from its beginning on."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    held: int = 0  # problems of which an engine still holds something at the end
    seconds: float = 0.0


def alone(solver: Solver, problems: Sequence[str]) -> dict[tuple[int, int], str]:
    """What each problem comes to by itself, by problem and kind."""
    keys = [(number, kind) for number in range(len(problems)) for kind in range(len(KINDS))]
    found = {}
    for number, kind in keys:
        (outcome,) = solve_many(solver, [Task(problems[number], KINDS[kind])], batch_size=1)
        found[number, kind] = _told(outcome.solution, outcome.error)
    return found


def _told(solution: Solution | None, error: SpecguardError | None) -> str:
    if solution is None:
        return f"error: {error}"
    return f"{solution.finish_reason}: {solution.text}"


async def soak(
    solver: Solver,
    problems: Sequence[str],
    wanted: dict[tuple[int, int], str],
    number: int,
    batch_size: int,
    seed: int,
) -> Found:
    """Solve so many; runs of `solve_many` one after the other, a part of them left early."""
    rng, found, started_at = random.Random(seed), Found(), time.perf_counter()
    process = psutil.Process()
    while (left := number - found.outcomes.total() + found.outcomes["left early"]) > 0:
        keys = [
            (rng.randrange(len(problems)), rng.randrange(len(KINDS)))
            for _ in range(min(left, rng.randint(1, 20 * batch_size)))
        ]
        tasks = [Task(problems[number], KINDS[kind]) for number, kind in keys]
        stops_after = rng.randrange(len(tasks)) if rng.random() < 0.3 else None
        running = solve_many_async(solver, tasks, batch_size=batch_size)
        others = [asyncio.create_task(_cancelled(solver, rng, problems, found)) for _ in range(2)]
        try:
            for done in count():
                if done == stops_after:
                    found.outcomes["left early"] += len(tasks) - done
                    break
                outcome = await anext(running, None)
                if outcome is None:
                    break
                told = _told(outcome.solution, outcome.error)
                found.outcomes["error" if outcome.error else "solved"] += 1
                if told != wanted[keys[outcome.index]]:
                    found.failures.append(f"{keys[outcome.index]}: {told!r:.300}")
        finally:
            await running.aclose()
            await asyncio.gather(*others)
        found.memory.append(process.memory_info().rss / 2**20)
    found.seconds = time.perf_counter() - started_at
    gc.collect()
    engines: tuple[Any, ...] = solver.draft, solver.target
    found.held = sum(len(engine._kept) for engine in engines)
    return found


async def _cancelled(
    solver: Solver, rng: random.Random, problems: Sequence[str], found: Found
) -> None:
    """A problem beside the others that nobody waits for to the end."""
    task = asyncio.create_task(solver.solve_async(rng.choice(problems), **rng.choice(KINDS[:-1])))
    await asyncio.sleep(rng.uniform(0, 0.2))
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        found.outcomes["cancelled"] += 1
    else:
        found.outcomes["solved before it was cancelled"] += 1


@click.command(context_settings={"show_default": True})
@click.option("--backend", default="cpu")
@click.option("--number", type=click.IntRange(min=1), default=20_000)
@click.option("--batch-size", type=click.IntRange(min=1), default=16)
@click.option("--problems", "num_problems", type=click.IntRange(min=1), default=100)
@click.option("--seed", type=int, default=0)
def main(backend: str, number: int, batch_size: int, num_problems: int, seed: int) -> None:
    """Solve thousands of problems of the built-in pair; exit 1 where something went wrong."""
    cost = DraftCost(*map(float, DRAFT_COST.split(",")))
    solver, problems = load("tiny", backend=backend, draft_cost=cost), texts(num_problems)
    wanted = alone(solver, problems)
    found = asyncio.run(soak(solver, problems, wanted, number, batch_size, seed))
    counts = ", ".join(f"{many} {name}" for name, many in sorted(found.outcomes.items()))
    click.echo(f"{counts}, in {found.seconds:.0f} s; {len(found.failures)} failures.")
    tenths = [float(np.median(part)) for part in np.array_split(found.memory, 10) if len(part)]
    click.echo(f"Memory in MiB, medians of tenths: {', '.join(f'{part:.0f}' for part in tenths)}.")
    click.echo(f"Held by the engines at the end: {found.held} problems.")
    for failure in found.failures[:10]:
        click.echo(failure)
    if found.failures or found.held:
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()

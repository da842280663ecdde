"""What serving costs: ``python -m benchmarks.load --help``.

The same problems through `solve_many` and through the server, by so many clients as problems at a
time; and through the server by the target alone.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

import click

from benchmarks.served import DRAFT_COST, ask, body, started, texts
from specguard import SpecguardError, load, solve_many
from specguard.bench.tables import as_table, machine, machine_line
from specguard.core import DraftCost

# How it is called, whether answers are streamed, and our own options.
WAYS: tuple[tuple[str, bool, dict[str, Any]], ...] = (
    ("served", False, {}),
    ("served, streamed", True, {}),
    ("target alone, served", False, {"method": "target"}),
)


@dataclass(frozen=True, slots=True)
class LoadLine:
    """One way to have the problems solved, ``clients`` at a time; seconds but for the first three.

    ``ratio`` is of the time of `solve_many` with as many at a time.
    """

    way: str
    clients: int
    solutions_per_second: float
    ratio: float
    median: float | None = None
    p95: float | None = None
    first_step: float | None = None


async def drive(
    url: str, problems: Sequence[str], clients: int, stream: bool, **own: Any
) -> tuple[float, list[Any]]:
    """All seconds that so many clients take, and the replies, in the problems' order.

    Raises:
        SpecguardError: a request failed.
    """
    replies: list[Any] = [None] * len(problems)
    waiting = iter(enumerate(problems))

    async def client() -> None:
        for index, problem in waiting:
            replies[index] = await ask(url, body(problem, stream, **own))
            if replies[index].status != 200:
                raise SpecguardError(f"the server answered {replies[index]}")

    started_at = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - started_at, replies


def measure(problems: Sequence[str], clients: int, backend: str) -> list[LoadLine]:
    """`solve_many`, and the ways to be served.

    Raises:
        SpecguardError: a request failed, or an answer is another one than unserved.
    """
    figures = map(float, DRAFT_COST.split(","))
    solver = load("tiny", backend=backend, draft_cost=DraftCost(*figures))
    list(solve_many(solver, problems[:clients], batch_size=clients))
    started_at = time.perf_counter()
    solved = list(solve_many(solver, problems, batch_size=clients))
    seconds = time.perf_counter() - started_at
    wanted = {done.index: done.solution.text for done in solved if done.solution is not None}
    del solver
    count = len(problems)
    lines = [LoadLine("solve_many", clients, count / seconds, 1.0)]
    arguments = ["--backend", backend, "--batch-size", str(clients), "--draft-cost", DRAFT_COST]
    with started(arguments) as server:
        for way, stream, own in WAYS:
            asyncio.run(drive(server.url, problems[:clients], clients, stream, **own))
            took, replies = asyncio.run(drive(server.url, problems, clients, stream, **own))
            if not own and {i: reply.text for i, reply in enumerate(replies)} != wanted:
                raise SpecguardError("a served answer is another one than unserved")
            times = sorted(reply.seconds for reply in replies)
            lines.append(
                LoadLine(
                    way,
                    clients,
                    count / took,
                    took / seconds,
                    median(times),
                    quantiles(times, n=20)[-1] if count > 1 else times[0],
                    median(reply.first_seconds or 0.0 for reply in replies) if stream else None,
                )
            )
    return lines


def load_table(lines: Sequence[LoadLine]) -> str:
    """Markdown."""

    def cell(seconds: float | None) -> str:
        return "" if seconds is None else f"{seconds:.3f}"

    rows = [
        [
            line.way,
            str(line.clients),
            f"{line.solutions_per_second:.2f}",
            f"{line.ratio:.3f}",
            *map(cell, (line.median, line.p95, line.first_step)),
        ]
        for line in lines
    ]
    columns = ("way", "clients", "solutions/s", "time / solve_many")
    return as_table((*columns, "median s", "p95 s", "first step s"), rows)


_POSITIVE = click.IntRange(min=1)


@click.command(context_settings={"show_default": True})
@click.option("--backend", default="cpu")
@click.option("--clients", type=_POSITIVE, multiple=True, default=(1, 8, 32))
@click.option("--requests", type=_POSITIVE, default=256, help="Problems for each number.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of the table.")
def main(backend: str, clients: tuple[int, ...], requests: int, as_json: bool) -> None:
    """Time the built-in pair behind the server and without it."""
    problems = texts(requests)
    lines = [line for number in clients for line in measure(problems, number, backend)]
    about = {**machine(), "backend": backend, "requests": str(requests)}
    if as_json:
        click.echo(json.dumps({"machine": about, "lines": [asdict(line) for line in lines]}))
        return
    click.echo(f"{machine_line(about)}.\n\n{load_table(lines)}", nl=False)


if __name__ == "__main__":
    main()

"""Whether the server lasts: ``python -m benchmarks.soak --help``.

Requests of mixed kinds from several clients; of ten, one hangs up early and one is broken. Every
answer is compared with the unserved one, and the memory is looked at all along.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import numpy as np

from benchmarks.served import DRAFT_COST, Reply, Server, ask, body, started, texts
from specguard import load, solve_many
from specguard.core import DraftCost, Task

# What a request may ask for, as options of ours; the same as changes to the settings.
KINDS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({}, {}),
    ({"method": "target"}, {"method": "target"}),
    ({"method": "draft"}, {"method": "draft"}),
    ({"k": 4}, {"num_candidates": 4}),
    ({"method": "sd"}, {"method": "sd"}),
    ({"detail": True, "stream_steps": True}, {}),
)
BROKEN: tuple[bytes, ...] = (
    b"{",
    b'{"model": "tiny"}',
    b'{"model": "other", "messages": [{"role": "user", "content": "x"}]}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "What is love?"}]}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "logprobs": true}',
    b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b"[" * 5000,
)


@dataclass(slots=True)
class Found:
    """What came of a run; ``memory`` is of the server, in MiB, from its beginning on."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def growth(self) -> float:
        """MiB by which the last quarter's median is above the second quarter's.

        In the first one, caches are filled.
        """
        quarter = len(self.memory) // 4
        second, last = self.memory[quarter : 2 * quarter], self.memory[-quarter:]
        return float(np.median(last) - np.median(second)) if quarter else 0.0


@dataclass(frozen=True, slots=True)
class Call:
    """A request: its problem and kind, and what is wrong with it."""

    problem: int
    kind: int
    stream: bool
    trouble: str | None
    cut_after: int


def calls(requests: int, num_problems: int, seed: int = 0) -> Iterator[Call]:
    """Mixed requests, of ten one that hangs up and one that is broken."""
    rng = np.random.default_rng(seed)
    for _ in range(requests):
        drawn = rng.integers(10)
        trouble = {0: "cut", 1: "broken"}.get(int(drawn))
        yield Call(
            int(rng.integers(num_problems)),
            int(rng.integers(len(KINDS))),
            bool(rng.integers(2)),
            trouble,
            int(rng.integers(4)),
        )


def unserved(problems: Sequence[str], backend: str) -> dict[tuple[int, int], str]:
    """The text by problem and kind."""
    figures = map(float, DRAFT_COST.split(","))
    solver = load("tiny", backend=backend, draft_cost=DraftCost(*figures))
    keys = [(number, kind) for number in range(len(problems)) for kind in range(len(KINDS))]
    tasks = [Task(problems[number], KINDS[kind][1]) for number, kind in keys]
    return {
        keys[done.index]: done.solution.text
        for done in solve_many(solver, tasks)
        if done.solution is not None
    }


async def soak(
    server: Server,
    problems: Sequence[str],
    wanted: dict[tuple[int, int], str],
    asked: Iterator[Call],
    clients: int,
    least_seconds: float,
) -> Found:
    """Drive the server until all is asked; spread over ``least_seconds`` at least."""
    found, started_at = Found(), time.perf_counter()
    every = list(asked)
    waiting = iter(enumerate(every))

    async def client() -> None:
        for number, call in waiting:
            ahead = started_at + least_seconds * number / len(every) - time.perf_counter()
            await asyncio.sleep(max(0.0, ahead))
            await _make(server, problems, wanted, call, found)

    async def watch() -> None:
        while True:
            found.memory.append(server.memory() / 2**20)
            await asyncio.sleep(max(0.2, least_seconds / 1000))

    watching = asyncio.create_task(watch())
    try:
        await asyncio.gather(*(client() for _ in range(clients)))
    finally:
        watching.cancel()
    found.seconds = time.perf_counter() - started_at
    return found


async def _make(
    server: Server,
    problems: Sequence[str],
    wanted: dict[tuple[int, int], str],
    call: Call,
    found: Found,
) -> None:
    if call.trouble == "broken":
        reply = await ask(server.url, BROKEN[call.problem % len(BROKEN)])
        _count(found, "broken", reply, 400 <= reply.status < 500)
        return
    asked = body(problems[call.problem], call.stream, **KINDS[call.kind][0])
    if call.trouble == "cut":
        await ask(server.url, asked, cut_after=call.cut_after if call.stream else 0)
        found.outcomes["cut off"] += 1
        return
    reply = await ask(server.url, asked)
    is_right = reply.status == 200 and reply.text == wanted[call.problem, call.kind]
    _count(found, "answered", reply, is_right)


def _count(found: Found, name: str, reply: Reply, is_right: bool) -> None:
    found.outcomes[name] += 1
    if not is_right:
        found.failures.append(f"{name}: {reply.status} {reply.chunks!r:.300}")


_POSITIVE = click.IntRange(min=1)


@click.command(context_settings={"show_default": True})
@click.option("--backend", default="cpu")
@click.option("--requests", type=_POSITIVE, default=20_000)
@click.option("--minutes", type=click.FloatRange(0), default=30.0, help="At least.")
@click.option("--clients", type=_POSITIVE, default=16)
@click.option("--problems", "num_problems", type=_POSITIVE, default=100, help="Different ones.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def main(
    backend: str, requests: int, minutes: float, clients: int, num_problems: int, as_json: bool
) -> None:
    """Drive a server of the built-in pair for a while; exit 1 where something went wrong."""
    problems = texts(num_problems)
    wanted = unserved(problems, backend)
    arguments = ["--backend", backend, "--draft-cost", DRAFT_COST, "--queue", str(clients)]
    with started(arguments) as server:
        asked = calls(requests, num_problems)
        found = asyncio.run(soak(server, problems, wanted, asked, clients, 60 * minutes))
        is_alive = server.process.poll() is None
    if as_json:
        told = {
            name: getattr(found, name) for name in ("outcomes", "failures", "memory", "seconds")
        }
        click.echo(json.dumps({**told, "growth": found.growth}))
    else:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(found.outcomes.items()))
        first, most = found.memory[len(found.memory) // 4], max(found.memory)
        click.echo(f"{counts}, in {found.seconds:.0f} s; {len(found.failures)} failures.")
        click.echo(f"Memory: {first:.0f} MiB after a quarter, {most:.0f} at most; last quarter")
        click.echo(f"beside the second: {found.growth:+.1f} MiB.")
        for failure in found.failures[:10]:
            click.echo(failure)
    if found.failures or not is_alive:
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()

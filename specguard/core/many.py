"""Many problems side by side: as many as there is room for, each one's outcome as it comes.

Sharing passes among them is the engines' business. A solution's text depends neither on the other
problems nor on how many there are. Where these share passes, guesses of a few tokens at a time cost
more than they save: unless somebody asks for them, none are made.
"""

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from specguard.core.checks import check_problem
from specguard.core.config import SolveConfig
from specguard.core.context import opens_thinking
from specguard.core.engine import Engine, Prompt
from specguard.core.errors import SpecguardError, UsageError
from specguard.core.pairing import Pair
from specguard.core.records import Solution
from specguard.core.runner import drain
from specguard.core.solver import Solver

# A buffer doubles when it is full, and is there twice while it moves.
_BYTES_PER_BYTE = 3


@dataclass(frozen=True, slots=True)
class Task:
    """A problem, and changes to the settings for it alone."""

    problem: str
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finished:
    """What became of the problem with this number: its solution, or why there is none."""

    index: int
    solution: Solution | None = None
    error: SpecguardError | None = None


def solve_many(
    solver: Solver,
    problems: Iterable[str | Task],
    *,
    batch_size: int = 8,
    memory_budget: int | None = None,
    time_limit: float | None = None,
    **changes: Any,
) -> Generator[Finished]:
    """Solve problems side by side; each one's outcome is yielded as soon as it is there.

    An error of one problem, an impossible setting of its own included, is its outcome and leaves
    the others alone. Closing the iterator cancels what is under way.

    Args:
        solver: a pair with settings.
        problems: texts, or `Task`s where settings differ; read as there is room for them.
        batch_size: most problems at a time.
        memory_budget: bytes that keys and values may take at most; problems wait until there is
            room for the longest solution that their settings allow. None sets no limit.
        time_limit: seconds that a problem may take from when its turn has come; an error is the
            outcome of one that takes longer, whatever it waits for. None sets no limit.
        changes: to the solver's settings, for all of them.

    Raises:
        UsageError: a batch size below 1, a time limit that is none, no list of texts, or a setting
            that `SolveConfig` refuses.
    """
    return drain(
        solve_many_async(
            solver,
            problems,
            batch_size=batch_size,
            memory_budget=memory_budget,
            time_limit=time_limit,
            **changes,
        )
    )


def solve_many_async(
    solver: Solver,
    problems: Iterable[str | Task],
    *,
    batch_size: int = 8,
    memory_budget: int | None = None,
    time_limit: float | None = None,
    **changes: Any,
) -> AsyncGenerator[Finished]:
    """`solve_many` in an event loop."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {batch_size!r}")
    if time_limit is not None and not 0 < time_limit < float("inf"):
        raise UsageError(f"time_limit must be a positive number of seconds, not {time_limit}")
    if not isinstance(solver, Solver):
        raise UsageError(f"a solver is needed, not {type(solver).__name__}", "specguard.load()")
    if isinstance(problems, str):
        raise UsageError("problems are a list of texts, not one", "for one: solver.solve(text)")
    if not isinstance(problems, Iterable):
        raise UsageError(f"problems are a list of texts, not {type(problems).__name__}")
    solver.configured(**changes)
    tasks = (
        Task(task.problem, {**changes, **task.changes})
        if isinstance(task, Task)
        else Task(task, changes)
        for task in problems
    )
    return _solve(solver, enumerate(tasks), batch_size, memory_budget, time_limit)


async def _solve(
    solver: Solver,
    tasks: Iterator[tuple[int, Task]],
    batch_size: int,
    budget: int | None,
    time_limit: float | None,
) -> AsyncGenerator[Finished]:
    running: dict[asyncio.Task[Finished], int] = {}  # and the bytes that each may take
    waiting = next(tasks, None)
    try:
        while waiting is not None or running:
            while waiting is not None and len(running) < batch_size:
                index, task = waiting
                try:
                    num_bytes = _most_bytes(solver, task, budget)
                except SpecguardError as error:
                    yield Finished(index, error=error)
                    waiting = next(tasks, None)
                    continue
                if budget is not None and running and sum(running.values()) + num_bytes > budget:
                    break
                outcome = _outcome(solver, index, task, time_limit, shares_passes=batch_size > 1)
                running[asyncio.create_task(outcome)] = num_bytes
                waiting = next(tasks, None)
            if running:
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for finished in sorted((one.result() for one in done), key=lambda one: one.index):
                    yield finished
                for one in done:
                    del running[one]
    finally:
        for one in running:
            one.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _outcome(
    solver: Solver, index: int, task: Task, time_limit: float | None, shares_passes: bool
) -> Finished:
    try:
        async with asyncio.timeout(time_limit) as limit:
            solution = await solver.solve_async(
                task.problem, shares_passes=shares_passes, **task.changes
            )
        return Finished(index, solution)
    except TimeoutError:
        if not limit.expired():
            raise
        message = f"no solution within {time_limit:g} s"
        return Finished(index, error=SpecguardError(message, "allow more time, or fewer tokens"))
    except SpecguardError as error:
        return Finished(index, error=error.with_traceback(None))  # it holds what was in hand


def _most_bytes(solver: Solver, task: Task, budget: int | None) -> int:
    """What the problem's keys and values may come to.

    Raises:
        UsageError: the budget does not hold it, or the task's settings are refused.
    """
    if budget is None:
        return 0
    config = solver.configured(**task.changes)
    check_problem(task.problem)
    tokenizer = solver.pair.tokenizer_for(config)
    prompt = tokenizer.encode_prompt(task.problem, config.system_prompt, config.thinking)
    needed = most_bytes(solver.pair, prompt, config)
    if needed > budget:
        raise UsageError(
            f"the problem may take {needed} bytes of keys and values, and the budget is {budget}",
            "allow more memory, or fewer tokens or candidates",
        )
    return needed


def most_bytes(pair: Pair, prompt: Prompt, config: SolveConfig) -> int:
    """What keys and values of a problem may come to, of the engines that the settings use."""
    engines = pair.engines_for(config).values()
    return sum(_most_bytes_of(engine, prompt, config) for engine in engines)


def _most_bytes_of(engine: Engine, prompt: Prompt, config: SolveConfig) -> int:
    num_prompt = len(prompt.token_ids)
    thinks = config.thinking or opens_thinking(engine.tokenizer, prompt)
    num_held = num_prompt + config.most_tokens(engine.context_limit - num_prompt, thinks)
    num_drafted = config.num_candidates * config.max_step_tokens if config.is_stepwise else 0
    return _BYTES_PER_BYTE * (num_held + num_drafted) * engine.num_bytes_per_token

"""Jobs of many problems in one engine: what goes together, and what stays with its problem."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from specguard.backends.local.engine import LocalEngine
from specguard.backends.local.layer import Outputs, Row
from specguard.backends.pytorch.loading import load_model
from specguard.core import SolveConfig, Solver, SpecguardError, Task, solve_many
from tests.contract.calls import (
    FLAT,
    PREFIX,
    assert_same,
    boundary,
    generate_job,
    run,
    run_together,
    score_job,
)

POISON = 901  # a token id that makes every pass fail that forwards it
PREFIXES = [(5, 40 + number, 41, 60, 61 + number, 7) for number in range(4)]


class Watched:
    """A tensor layer that counts its passes and fails where it is told to."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.passes: list[int] = []  # rows of each pass
        self.num_tokens = 0
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def forward(
        self,
        rows: Sequence[Row],
        token_ids: Any,
        positions: Sequence[int],
        wanted: Sequence[int] | None,
    ) -> Outputs | None:
        self.passes.append(len(rows))
        self.num_tokens += len(positions)
        if self.error is not None and POISON in list(token_ids):
            raise self.error
        outputs: Outputs | None = self._layer.forward(rows, token_ids, positions, wanted)
        return outputs


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LocalEngine:
    return load_model(str(checkpoint))


@pytest.fixture
def engine(loaded: LocalEngine) -> LocalEngine:
    """An engine with nothing kept, over a watched layer."""
    layer: Any = Watched(loaded.layer)
    return LocalEngine(loaded.name, layer, loaded.tokenizer, loaded.context_limit)


def watched(engine: LocalEngine) -> Watched:
    assert isinstance(engine.layer, Watched)
    return engine.layer


def drawing(engine: LocalEngine, **more: Any) -> list[Any]:
    return [
        generate_job(engine, prefix, sampling=FLAT, key=number, seed=number, **more)
        for number, prefix in enumerate(PREFIXES)
    ]


def reading() -> list[Any]:
    return [
        score_job([[50, 51], [52]], prefix, key=number) for number, prefix in enumerate(PREFIXES)
    ]


def alone(loaded: LocalEngine, job: Any) -> list[Any]:
    """The result of a job on an engine that has seen nothing else."""
    return run(LocalEngine(loaded.name, loaded.layer, loaded.tokenizer, loaded.context_limit), job)


def test_problems_share_passes(engine: LocalEngine, loaded: LocalEngine) -> None:
    jobs = drawing(engine, boundary=boundary(engine, 6, "\0"))
    for found, job in zip(run_together(engine, jobs), jobs, strict=True):
        assert_same(found, alone(loaded, job))
    assert watched(engine).passes == [4] * 6
    watched(engine).passes.clear()
    jobs = reading()
    for found, job in zip(run_together(engine, jobs), jobs, strict=True):
        assert_same(found, alone(loaded, job))
    assert watched(engine).passes == [4]


def test_who_is_done_does_not_wait(engine: LocalEngine) -> None:
    done: list[str] = []

    async def ask(name: str, cap: int, key: int) -> None:
        cut = boundary(engine, cap, "\0")
        await engine.generate(generate_job(engine, PREFIXES[key], cap=cap, boundary=cut, key=key))
        done.append(f"{name} after {len(watched(engine).passes)} passes")

    async def work() -> None:
        await asyncio.gather(ask("long", 12, 0), ask("short", 2, 1), ask("middle", 6, 2))

    asyncio.run(work())
    assert done == ["short after 2 passes", "middle after 6 passes", "long after 12 passes"]


def test_who_comes_later_joins_the_passes_under_way(
    engine: LocalEngine, loaded: LocalEngine
) -> None:
    first, second = (
        generate_job(engine, PREFIXES[key], cap=24, boundary=boundary(engine, 24, "\0"), key=key)
        for key in range(2)
    )

    async def work() -> list[Any]:
        early = asyncio.create_task(engine.generate(first))
        while len(watched(engine).passes) < 8:
            await asyncio.sleep(0)
        return await asyncio.gather(early, engine.generate(second))

    for found, job in zip(asyncio.run(work()), (first, second), strict=True):
        assert_same(found, alone(loaded, job))
    assert len(watched(engine).passes) < 48


def test_jobs_of_two_kinds_both_come_to_an_end(engine: LocalEngine) -> None:
    """Many of one kind that keep coming back do not starve one of another."""
    finished: list[str] = []

    async def keep_asking(key: int) -> None:
        for seed in range(40):
            cut = boundary(engine, 2, "\0")
            await engine.generate(
                generate_job(engine, PREFIXES[key], cap=2, boundary=cut, key=key, seed=seed)
            )
        finished.append("many")

    async def ask_once() -> None:
        await engine.generate(generate_job(engine, PREFIX, cap=2, sampling=FLAT, key="other"))
        finished.append("once")

    async def work() -> None:
        await asyncio.gather(*(keep_asking(key) for key in range(3)), ask_once())

    asyncio.run(work())
    assert finished[0] == "once"


@pytest.mark.parametrize("kind", ["generate", "score"])
def test_an_error_in_a_shared_pass_is_the_guilty_job_s_alone(
    kind: str, engine: LocalEngine, loaded: LocalEngine
) -> None:
    watched(engine).error = SpecguardError("this token is poison")
    jobs = drawing(engine) if kind == "generate" else reading()
    poisoned = (*PREFIX, POISON)
    guilty: Any = (
        generate_job(engine, poisoned, key="guilty")
        if kind == "generate"
        else score_job([[50]], poisoned, key="guilty")
    )
    outcomes = gather(engine, [*jobs, guilty])
    assert isinstance(outcomes[-1], SpecguardError)
    assert outcomes[-1].message == "this token is poison"
    for found, job in zip(outcomes, jobs, strict=False):
        assert_same(found, alone(loaded, job))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: 9 GB"
        ),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_is_that_problem_s_outcome(
    error: Exception, engine: LocalEngine, loaded: LocalEngine
) -> None:
    watched(engine).error = error
    jobs = drawing(engine)
    outcomes = gather(engine, [*jobs, generate_job(engine, (*PREFIX, POISON), key="guilty")])
    assert isinstance(outcomes[-1], SpecguardError)
    assert outcomes[-1].message == f"memory ran out while {engine.name} was running"
    assert "\n" not in outcomes[-1].message
    assert "--k" in outcomes[-1].hint
    for found, job in zip(outcomes, jobs, strict=False):
        assert_same(found, alone(loaded, job))


def test_a_defect_reaches_everybody_who_waits(engine: LocalEngine) -> None:
    watched(engine).error = RuntimeError("a defect")
    guilty = generate_job(engine, (*PREFIX, POISON), sampling=FLAT, key="guilty")
    outcomes = gather(engine, [*drawing(engine), guilty])
    assert all(isinstance(outcome, RuntimeError) for outcome in outcomes)


def gather(engine: LocalEngine, jobs: Sequence[Any]) -> list[Any]:
    """Results or errors of jobs that are there at the same time."""

    async def work() -> list[Any]:
        asked = (
            engine.generate(job) if hasattr(job, "boundary") else engine.score(job) for job in jobs
        )
        return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(work())


def test_a_cancelled_job_leaves_before_the_next_passes(engine: LocalEngine) -> None:
    cut = boundary(engine, 64, "\0")
    jobs = [generate_job(engine, PREFIXES[key], cap=64, boundary=cut, key=key) for key in range(2)]

    async def work() -> None:
        kept, cancelled = (asyncio.create_task(engine.generate(job)) for job in jobs)
        while len(watched(engine).passes) < 8:
            await asyncio.sleep(0)
        cancelled.cancel()
        engine.release(1)
        await asyncio.gather(kept, cancelled, return_exceptions=True)

    asyncio.run(work())
    assert watched(engine).passes.count(2) <= 16
    assert len(watched(engine).passes) == 64
    assert engine.num_kept == 1


def test_a_beginning_in_common_is_read_once(engine: LocalEngine, loaded: LocalEngine) -> None:
    beginning = tuple(range(30, 60))
    jobs = [score_job([[50]], (*beginning, 70 + key), key=key) for key in range(3)]
    for job in jobs:
        assert_same(run(engine, job), alone(loaded, job))
    assert watched(engine).num_tokens == len(beginning) + 1 + 1 + 1


def test_several_threads_use_one_engine(engine: LocalEngine, loaded: LocalEngine) -> None:
    jobs = drawing(engine, cap=12)
    results: dict[int, Any] = {}

    def work(number: int) -> None:
        results[number] = run(engine, jobs[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, job in enumerate(jobs):
        assert_same(results[number], alone(loaded, job))


def test_nothing_is_left_of_an_event_loop(engine: LocalEngine) -> None:
    loops = []

    async def work() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        await engine.generate(generate_job(engine))

    asyncio.run(work())
    gc.collect()
    assert loops[0]() is None


@contextmanager
def interrupted(engine: LocalEngine, after: int) -> Iterator[None]:
    """Ctrl-C in the middle of a pass."""
    layer = watched(engine)
    forward = layer._layer.forward

    def stop(*arguments: Any) -> Any:
        if len(layer.passes) > after:
            raise KeyboardInterrupt
        return forward(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer._layer, "forward", stop)
        yield


def test_an_interruption_frees_everything_and_spoils_nothing(engine: LocalEngine) -> None:
    config = SolveConfig(
        method="target", max_tokens=24, max_step_tokens=8, max_steps=3, draft_cost=None
    )
    solver = Solver(target=engine, config=config)
    expected = solver.solve("Some problem.").text
    with (
        interrupted(engine, after=len(watched(engine).passes) + 12),
        pytest.raises(KeyboardInterrupt),
    ):
        list(solve_many(solver, ["Some problem.", "Another one.", "A third."], batch_size=3))
    assert engine.num_kept == 0
    assert solver.solve("Some problem.").text == expected


def test_solutions_of_a_batch_are_those_of_each_alone(engine: LocalEngine) -> None:
    config = SolveConfig(num_candidates=3, max_tokens=40, max_step_tokens=10, max_steps=5)
    solver = Solver(engine, engine, config)
    problems: list[str | Task] = [
        "Some problem.",
        Task("Another one.", {"seed": 3}),
        Task("Too long. " * 400),
        Task("A third.", {"num_candidates": 1}),
    ]
    results = {outcome.index: outcome for outcome in solve_many(solver, problems, batch_size=4)}
    assert "context window" in str(results[2].error)
    solve: Callable[..., Any] = solver.solve
    for index, expected in {
        0: solve("Some problem."),
        1: solve("Another one.", seed=3),
        3: solve("A third.", num_candidates=1),
    }.items():
        solution = results[index].solution
        assert solution is not None
        assert solution.text == expected.text
        assert [step.decision for step in solution.steps] == [
            step.decision for step in expected.steps
        ]

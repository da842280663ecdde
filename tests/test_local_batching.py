"""Jobs of many problems in one engine: what goes together, and what stays with its problem."""

import asyncio
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specguard.backends.local.engine import LocalEngine
from specguard.core import SolveConfig, Solver, Task, solve_many
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
from tests.engines import WatchedLayer, fresh, load_local, over

PREFIXES = [(5, 40 + number, 41, 60, 61 + number, 7) for number in range(4)]


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LocalEngine:
    return load_local("torch", checkpoint)


@pytest.fixture
def engine(loaded: LocalEngine) -> LocalEngine:
    """An engine with nothing kept, over a watched layer."""
    return over(WatchedLayer(loaded.layer), loaded)


def watched(engine: LocalEngine) -> WatchedLayer:
    assert isinstance(engine.layer, WatchedLayer)
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
    return run(fresh(loaded), job)


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


def test_an_interruption_frees_everything_and_spoils_nothing(loaded: LocalEngine) -> None:
    num_passes = 0

    def stop(token_ids: list[int]) -> None:
        nonlocal num_passes
        num_passes += 1
        if num_passes == 12:
            raise KeyboardInterrupt

    engine = over(WatchedLayer(loaded.layer, stop), loaded)
    config = SolveConfig(
        method="target", max_tokens=24, max_step_tokens=8, max_steps=3, draft_cost=None
    )
    solver = Solver(target=engine, config=config)
    with pytest.raises(KeyboardInterrupt):
        list(solve_many(solver, ["Some problem.", "Another one.", "A third."], batch_size=3))
    assert engine.num_kept == 0
    expected = Solver(target=loaded, config=config).solve("Some problem.").text
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


def test_an_unexpected_error_is_the_guilty_job_s_alone(
    loaded: LocalEngine,
) -> None:
    engine = fresh(loaded)
    jobs = reading()
    beyond = score_job([[50]], (5, 10**6), key="guilty")  # no such token

    async def work() -> list[Any]:
        asked = (engine.score(job) for job in [*jobs, beyond])
        return await asyncio.gather(*asked, return_exceptions=True)

    *found, guilty = asyncio.run(work())
    assert isinstance(guilty, IndexError)
    for observations, job in zip(found, jobs, strict=True):
        assert_same(observations, alone(loaded, job))


def test_jobs_are_done_after_everything_was_cancelled(engine: LocalEngine) -> None:
    async def work() -> list[Any]:
        asked = asyncio.create_task(engine.generate(generate_job(engine)))
        while len(asyncio.all_tasks()) < 3:  # the batcher's task is there, and has not begun
            await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        return await asyncio.wait_for(engine.generate(generate_job(engine)), 20)

    assert asyncio.run(work())


def test_a_row_is_described_once_for_each_token(
    loaded: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows: list[int] = []
    describe = loaded.layer.describe

    def counted(parts: Any) -> Any:
        num_rows.extend(len(logits) for logits, _, _ in parts)
        return describe(parts)

    monkeypatch.setattr(loaded.layer, "describe", counted)
    continuations = [[30 + number, *range(40, 70)] for number in range(12)]
    run(fresh(loaded), score_job(continuations))
    assert sum(num_rows) <= sum(map(len, continuations))
    assert max(num_rows) <= 128


@pytest.mark.parametrize("num_new", [300, 40])
def test_long_prefixes_are_read_in_chunks(
    num_new: int, loaded: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tuple(5 + place % 90 for place in range(120))
    job = score_job([[6 + place % 80 for place in range(num_new)]], prefix)
    whole = alone(loaded, job)
    monkeypatch.setattr("specguard.backends.local.drawing.PREFILL_CHUNK", 50)
    assert_same(alone(loaded, job), whole)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals are sent as on Unix")
def test_ctrl_c_in_the_middle_of_a_pass_frees_everything(loaded: LocalEngine) -> None:
    engine = fresh(loaded)
    config = SolveConfig(method="target", max_tokens=24, max_step_tokens=8, max_steps=3)
    solver = Solver(target=engine, config=config)
    expected = solver.solve("Some problem.").text

    def solve_until_interrupted(seconds: float) -> None:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        list(solve_many(solver, ["Some problem.", "Another one."] * 3, batch_size=3))
        timer.join()
        for _ in range(1000):  # Python hears of a signal a little later
            time.sleep(0.001)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for number in range(100):
            with pytest.raises(KeyboardInterrupt):
                solve_until_interrupted(0.002 + number * 1e-3)
            assert engine.num_kept == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert solver.solve("Some problem.").text == expected

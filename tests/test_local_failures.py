"""What becomes of jobs when a pass fails or somebody stops waiting, however tokens are read."""

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specguard.backends.local.engine import LocalEngine
from specguard.core import (
    Boundary,
    SolveConfig,
    Solver,
    SpecguardError,
    solve_many,
)
from tests.contract.calls import (
    FLAT,
    OTHER_PREFIX,
    PREFIX,
    assert_same,
    draws,
    forcing,
    generate_job,
    outcomes,
    run,
    score_job,
)
from tests.engines import LOCAL_ENGINES, WatchedLayer, load_local, over
from tests.reference import ReferenceEngine

POISON = 901  # a token whose pass fails
OUT_OF_MEMORY = {
    "torch": [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: not enough memory: "
            "you tried to allocate 9000000000 bytes."
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, other: 1.00 GB)."),
        MemoryError(),
    ],
    "mlx": [
        RuntimeError("[metal::malloc] Unable to allocate 9000000000 bytes."),
        RuntimeError("[metal::malloc] Attempting to allocate 9000000000 bytes"),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (0000000b)"),
        MemoryError(),
    ],
}
MESSAGES = [(name, error) for name, errors in OUT_OF_MEMORY.items() for error in errors]


@pytest.fixture(scope="module", params=LOCAL_ENGINES)
def loaded(request: pytest.FixtureRequest, checkpoint: Path) -> LocalEngine:
    return load_local(request.param, checkpoint)


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> ReferenceEngine:
    return ReferenceEngine.load(checkpoint)


def poisoned(loaded: LocalEngine, error: BaseException) -> LocalEngine:
    """An engine whose passes fail where the poison is among the tokens."""

    def watch(token_ids: list[int]) -> None:
        if POISON in token_ids:
            raise error

    return over(WatchedLayer(loaded.layer, watch), loaded)


def jobs_with_poison(engine: LocalEngine, plain: ReferenceEngine) -> tuple[list[Any], list[Any]]:
    """Sound jobs and others: with the poison in the prefix, drawn on the way, or scored."""
    drawn = np.stack([draws(1, 9)[0], forcing(plain, PREFIX, [70, 71, 72, POISON], 9)])
    sound = [
        generate_job(engine, PREFIX, 2, 9, FLAT, key="sound"),
        generate_job(engine, OTHER_PREFIX, 3, 12, FLAT, key="other"),
        generate_job(engine, OTHER_PREFIX, 2, 5, key="of another kind"),
        score_job([[50, 51], [52]], key="scored"),
    ]
    guilty = [
        generate_job(engine, (*PREFIX, POISON), 2, 4, FLAT, key="prefix"),
        generate_job(engine, PREFIX, 2, 9, FLAT, key="drawn", uniforms=drawn),
        score_job([[50, POISON, 51]], key="scored"),
    ]
    return sound, guilty


def test_an_error_of_a_shared_pass_is_the_outcome_of_who_caused_it(
    loaded: LocalEngine, plain: ReferenceEngine
) -> None:
    engine = poisoned(loaded, SpecguardError("there is poison", "take none"))
    sound, guilty = jobs_with_poison(engine, plain)
    for _ in range(2):
        found = outcomes(engine, [*guilty, *sound])
        assert [str(outcome) for outcome in found[:3]] == ["there is poison"] * 3
        for outcome, job in zip(found[3:], sound, strict=True):
            assert_same(outcome, run(plain, job))
    # Who has failed holds nothing, and can go on another way.
    for key in "prefix", "drawn":
        assert key not in engine._kept
        again = generate_job(engine, PREFIX, 2, 6, FLAT, key=key)
        assert_same(run(engine, again), run(plain, again))


@pytest.mark.parametrize(
    ("framework", "error"), MESSAGES, ids=[str(error)[:30] for _, error in MESSAGES]
)
def test_memory_that_runs_out_is_said_in_one_line(
    framework: str, error: BaseException, checkpoint: Path, plain: ReferenceEngine
) -> None:
    engine = poisoned(load_local(framework, checkpoint), error)
    sound, guilty = jobs_with_poison(engine, plain)
    found = outcomes(engine, [*guilty, *sound])
    for outcome in found[:3]:
        assert isinstance(outcome, SpecguardError)
        assert outcome.message == f"memory ran out while {engine.name} was running"
        assert outcome.hint.startswith("fewer candidates (--k), fewer problems at a time")
    for outcome, job in zip(found[3:], sound, strict=True):
        assert_same(outcome, run(plain, job))


def test_memory_that_runs_out_is_the_outcome_of_its_problem(loaded: LocalEngine) -> None:
    texts = ["Some problem.", "Tom has 3 pens.", "Another one."]
    prompts = [set(loaded.tokenizer.encode_prompt(text, None, False).token_ids) for text in texts]
    too_much = min(prompts[1] - prompts[0] - prompts[2])

    def watch(token_ids: list[int]) -> None:
        if too_much in token_ids:
            raise MemoryError

    config = SolveConfig(num_candidates=2, max_tokens=30, max_step_tokens=8, max_steps=5)
    expected = Solver(loaded, loaded, config)
    engine = over(WatchedLayer(loaded.layer, watch), loaded)
    found = {
        outcome.index: outcome
        for outcome in solve_many(Solver(engine, engine, config), texts, batch_size=3)
    }
    assert "memory ran out" in str(found[1].error)
    for index in 0, 2:
        solution = found[index].solution
        if solution is None:  # it has drawn that token itself
            assert "memory ran out" in str(found[index].error)
        else:
            assert solution.text == expected.solve(texts[index]).text
    assert any(outcome.solution for outcome in found.values())
    assert engine.num_kept == 0


def test_a_defect_leaves_nobody_waiting(loaded: LocalEngine, plain: ReferenceEngine) -> None:
    engine = poisoned(loaded, RuntimeError("a defect"))
    sound, guilty = jobs_with_poison(engine, plain)
    for job in guilty:
        found = outcomes(engine, [*sound, job])
        assert isinstance(found[-1], RuntimeError)
        assert {str(outcome) for outcome in found if isinstance(outcome, Exception)} == {"a defect"}
        for key in "sound", "other", "of another kind", "scored", "prefix", "drawn":
            engine.release(key)
    for outcome, job in zip(outcomes(engine, sound), sound, strict=True):
        assert_same(outcome, run(plain, job))


def test_who_is_cancelled_takes_part_no_longer_and_holds_nothing(
    loaded: LocalEngine, plain: ReferenceEngine
) -> None:
    layer = WatchedLayer(loaded.layer)
    engine = over(layer, loaded)
    cut = Boundary("\0", frozenset(), 48)
    jobs = [
        generate_job(engine, prefix, 2, 48, FLAT, key=number, boundary=cut)
        for number, prefix in enumerate([PREFIX, OTHER_PREFIX, (*PREFIX, 70)])
    ]

    def num_buffers() -> int:
        gc.collect()
        kind = type(loaded.layer.new_buffer())
        return sum(type(each) is kind for each in gc.get_objects())

    async def work() -> Any:
        tasks = [asyncio.create_task(engine.generate(job)) for job in jobs]
        while len(layer.passes) < 8:
            await asyncio.sleep(0)
        assert layer.passes[-1] == 3
        num_before = num_buffers()
        layer.passes.clear()
        tasks[1].cancel()
        engine.release(1)
        while not layer.passes:
            await asyncio.sleep(0)
        assert num_buffers() == num_before - 1
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(work())
    assert isinstance(found[1], asyncio.CancelledError)
    assert set(layer.passes) == {2}
    for index in 0, 2:
        assert_same(found[index], run(plain, jobs[index]))
    assert engine.num_kept == 2


@pytest.fixture
def no_complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """asyncio logs what it finds undone; nothing is."""
    yield
    gc.collect()
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


@pytest.mark.usefixtures("no_complaints")
def test_who_leaves_early_leaves_nothing_behind(loaded: LocalEngine) -> None:
    engine = over(loaded.layer, loaded)
    config = SolveConfig(num_candidates=2, max_tokens=60, max_step_tokens=8)
    solver = Solver(engine, engine, config)
    with solver.stream("Some problem.") as steps:
        next(steps)
        assert engine.num_kept == 2
    assert engine.num_kept == 0
    texts = ["Some problem.", "Another one.", "A third.", "A fourth."]
    solutions = solve_many(solver, texts, batch_size=3, max_steps=2)
    next(solutions)
    solutions.close()
    assert engine.num_kept == 0

    async def cancelled() -> None:
        task = asyncio.create_task(solver.solve_async("Some problem."))
        while not engine.num_kept:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert engine.num_kept == 0

    asyncio.run(cancelled())
    assert engine.num_kept == 0

"""How a solution is driven and ended: in any thread, inside an event loop, early, by an error."""

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from itertools import islice
from typing import Any, Literal

import pytest

from specguard.core import (
    Candidate,
    GenerateJob,
    Solution,
    SolveConfig,
    Solver,
    VerifierConfig,
    solve_many,
)
from specguard.core.runner import Runner, drain
from tests.scripted import Scripted

FACTS = [f"fact {number}.\n\n" for number in range(6)]
ANSWER, WRONG, RIGHT = "So \\boxed{7}.\n\n", "wrong.\n\n", "right.\n\n"
VERIFIER = VerifierConfig(weights={"log_prob": 1.0}, bounds={"log_prob": (-2.0, 0.0)})
CONFIG = SolveConfig(num_candidates=1, verifier=VERIFIER)
TEXT = FACTS[0] + RIGHT + ANSWER


def pair(**changes: Any) -> tuple[Scripted, Scripted, Solver]:
    """A draft whose second step the target writes anew, which the changes are for."""
    draft = Scripted("d", [FACTS[0], WRONG, ANSWER])
    target = Scripted("t", [RIGHT], {WRONG: -9}, **changes)
    return draft, target, Solver(draft, target, CONFIG)


def is_free(*engines: Scripted) -> bool:
    """Whether jobs were done and no engine holds anything of them."""
    return all(engine.jobs and not engine.held for engine in engines)


def test_a_finished_solution_has_let_go_of_its_keys() -> None:
    draft, target, solver = pair()
    assert solver.solve("p").text == TEXT
    assert is_free(draft, target)


def test_a_closed_stream_lets_go_at_once() -> None:
    draft, target, solver = pair()
    with solver.stream("p") as stream:
        assert next(stream).text == FACTS[0]
        assert draft.held
        assert target.held
    assert is_free(draft, target)
    assert stream.solution is None
    with pytest.raises(StopIteration):
        next(stream)
    stream.close()
    never = solver.stream("p")  # of one that has not begun there is nothing to let go of
    never.close()
    assert list(never) == []


def test_an_exception_in_a_consumer_lets_go_at_once() -> None:
    draft, target, solver = pair()

    def consume() -> None:
        with solver.stream("p") as stream:
            for step in stream:
                raise LookupError(step.text)

    with pytest.raises(LookupError, match="fact 0"):
        consume()
    assert is_free(draft, target)


def test_a_stream_that_is_left_lets_go() -> None:
    draft, target, solver = pair()
    for _ in solver.stream("p"):
        break
    gc.collect()
    assert is_free(draft, target)


@pytest.mark.parametrize("verb", ["generate", "score"])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("is_in_loop", [False, True])
def test_what_an_engine_raises_comes_out_and_lets_go(
    verb: str, error: BaseException, is_in_loop: bool
) -> None:
    draft, target, solver = pair(fail_at=verb, error=error)

    async def solve() -> Solution:
        return solver.solve("p")

    with pytest.raises(type(error)) as caught:
        asyncio.run(solve()) if is_in_loop else solver.solve("p")
    assert caught.value is error
    assert is_free(draft, target)
    assert draft.num_turns  # and the engines serve the next problem
    target.fail_at = None
    assert solver.solve("p").text == TEXT


class Interrupted(Scripted):
    """Ctrl-C comes while it works on its third job, and finds it waiting."""

    async def generate(self, job: GenerateJob) -> list[Candidate]:
        if len(self.generated) == 2:
            self.jobs.append(job)
            threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
            await asyncio.sleep(30)
        return await super().generate(job)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises in the main thread, as in a script or a notebook."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("where", ["script", "notebook", "many"])
def test_ctrl_c_lets_go_at_once(where: str) -> None:
    draft = Interrupted("d", [*FACTS, ANSWER])
    target = Scripted("t", [])
    solver = Solver(draft, target, CONFIG)

    async def cell() -> Solution:
        return solver.solve("p")

    loop = asyncio.new_event_loop()
    ways: dict[str, Callable[[], object]] = {
        "script": lambda: solver.solve("p"),
        "notebook": lambda: loop.run_until_complete(cell()),
        "many": lambda: list(solve_many(solver, ["p", "q"])),
    }
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ways[where]()
    assert time.monotonic() - started < 20  # what the engine was waiting for takes longer
    assert is_free(draft, target)
    loop.close()


@pytest.mark.parametrize("stops_at", ["generate", "score"])
def test_a_cancelled_task_lets_go_at_once(stops_at: Literal["generate", "score"]) -> None:
    draft, target, solver = pair()
    slow = target if stops_at == "score" else draft
    slow.num_turns = 10**9

    async def cancel() -> None:
        task = asyncio.create_task(solver.solve_async("p"))
        while not slow.jobs:
            await asyncio.sleep(0)
        assert slow.held
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not draft.held | target.held

    asyncio.run(cancel())


def test_steps_may_be_iterated_in_an_event_loop() -> None:
    draft, target, solver = pair()

    async def first_step() -> str:
        async with aclosing(solver.begin("p").steps()) as steps:
            async for step in steps:
                return step.text
        raise AssertionError

    assert asyncio.run(first_step()) == FACTS[0]
    assert is_free(draft, target)


def test_tasks_of_one_event_loop_share_an_engine() -> None:
    draft, target, solver = pair()

    async def solve() -> list[Solution]:
        return await asyncio.gather(*(solver.solve_async(f"p{n}") for n in range(5)))

    assert {solution.text for solution in asyncio.run(solve())} == {TEXT}
    # They ran side by side: each had begun before any was over.
    assert len({job.key for job in draft.jobs[:5]}) == 5
    assert is_free(draft, target)


def test_a_running_event_loop_is_no_hindrance() -> None:
    draft, target, solver = pair()

    async def cell() -> list[str]:
        texts = [solver.solve("p").text]
        with solver.stream("p") as stream:
            texts.append("".join(step.text for step in stream))
        texts += [
            outcome.solution.text for outcome in solve_many(solver, ["p"]) if outcome.solution
        ]
        with solver.stream("p") as stream:
            next(stream)
        assert is_free(draft, target)
        return texts

    before = set(threading.enumerate())
    assert asyncio.run(cell()) == [TEXT] * 3
    assert set(threading.enumerate()) <= before


def test_a_stream_may_be_begun_outside_an_event_loop_and_finished_inside() -> None:
    draft, target, solver = pair()
    stream = solver.stream("p")
    texts = [next(stream).text]

    async def rest() -> list[str]:
        return [step.text for step in stream]

    assert "".join(texts + asyncio.run(rest())) == TEXT
    assert stream.solution is not None
    assert is_free(draft, target)


def test_threads_share_an_engine() -> None:
    draft, target, solver = pair()
    with ThreadPoolExecutor(8) as pool:
        solutions = list(pool.map(solver.solve, [f"p{n}" for n in range(40)]))
    assert {solution.text for solution in solutions} == {TEXT}
    assert len({job.key for job in draft.jobs}) == 40
    assert is_free(draft, target)


@pytest.mark.parametrize("is_in_loop", [False, True])
def test_a_solution_may_be_made_while_another_is(is_in_loop: bool) -> None:
    draft, target, solver = pair()

    def nested() -> list[str]:
        outer = []
        with solver.stream("p") as stream:
            for step in stream:
                outer.append(step.text)
                assert solver.solve("q").text == TEXT
                assert len(list(solve_many(solver, ["r", "s"]))) == 2
        return outer

    async def cell() -> list[str]:
        return nested()

    assert "".join(asyncio.run(cell()) if is_in_loop else nested()) == TEXT
    assert is_free(draft, target)


class Lingering(Scripted):
    """Has work of its own in the event loop, which goes on after a job is done."""

    ended = 0

    async def generate(self, job: GenerateJob) -> list[Candidate]:
        self.work = asyncio.create_task(self.linger())
        return await super().generate(job)

    async def linger(self) -> None:
        try:
            await asyncio.sleep(30)
        finally:
            self.ended += 1


@pytest.mark.parametrize("is_in_loop", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2])
def test_an_engine_s_own_tasks_end_with_the_event_loop(
    is_in_loop: bool, num_steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    draft = Lingering("d", [FACTS[0], ANSWER])

    def work() -> None:
        with Solver(draft, Scripted("t", []), CONFIG).stream("p") as stream:
            assert len(list(islice(stream, num_steps))) == num_steps

    async def cell() -> None:
        work()

    asyncio.run(cell()) if is_in_loop else work()
    assert draft.ended == num_steps
    del draft.work
    gc.collect()
    assert not caplog.records  # "Task was destroyed but it is pending"


def test_a_runner_gives_results_and_errors_on() -> None:
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return 2 * number

    async def fail() -> None:
        raise LookupError("no")

    def in_loop(make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        with Runner() as runner:
            return runner.run(make())

    async def inside(make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        return in_loop(make)

    assert in_loop(lambda: double(3)) == asyncio.run(inside(lambda: double(3))) == 6
    for attempt in (lambda: in_loop(fail), lambda: asyncio.run(inside(fail))):
        with pytest.raises(LookupError, match="no"):
            attempt()


def test_items_are_made_when_they_are_asked_for() -> None:
    made = []

    async def items() -> Any:
        try:
            for number in range(3):
                made.append(number)
                yield number
        finally:
            made.append("closed")

    drained = drain(items())
    assert made == []
    assert next(drained) == 0
    assert made == [0]
    drained.close()
    assert made == [0, "closed"]
    assert list(drain(items())) == [0, 1, 2]


def test_ctrl_c_at_any_moment_is_an_interruption(interruptible: None) -> None:
    """Also as a problem ends: the event loop is not left half way."""
    num_interrupted = 0
    for number in range(150):
        draft, target, solver = pair()
        timer = threading.Timer(1e-3 + number * 2e-4, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            list(solve_many(solver, ["1 + 1", "2 + 2", "3 + 3"] * 4, batch_size=3))
            timer.join()
            time.sleep(0.001)  # Python hears of a signal a little later
        except KeyboardInterrupt:
            num_interrupted += 1
        assert not draft.held | target.held
    assert num_interrupted > 20


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("moment", ["created", "closed"])
def test_ctrl_c_as_an_event_loop_comes_or_goes_leaves_none_open(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops: list[asyncio.AbstractEventLoop] = []
    create = asyncio.new_event_loop

    def interrupted() -> asyncio.AbstractEventLoop:
        loops.append(loop := create())
        close = loop.close

        def close_interrupted() -> None:
            signal.raise_signal(signal.SIGINT)
            close()

        if moment == "created":
            signal.raise_signal(signal.SIGINT)
        elif len(loops) == 1:
            monkeypatch.setattr(loop, "close", close_interrupted)
        return loop

    monkeypatch.setattr(asyncio, "new_event_loop", interrupted)
    draft, target, solver = pair()
    with pytest.raises(KeyboardInterrupt):
        solver.solve("p")
    gc.collect()
    assert loops
    assert all(loop.is_closed() for loop in loops)
    assert not draft.held | target.held


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_just_before_an_item_is_begun_closes_the_items(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The item is asked for, and nobody waits for it any more."""
    made = []

    async def items() -> AsyncGenerator[int]:
        try:
            for number in range(3):
                made.append(number)
                await asyncio.sleep(0.01)
                yield number
        finally:
            made.append(-1)

    create = asyncio.BaseEventLoop.create_task

    def interrupted(loop: asyncio.BaseEventLoop, *arguments: Any, **more: Any) -> Any:
        task = create(loop, *arguments, **more)
        if made == [0]:
            monkeypatch.undo()
            signal.raise_signal(signal.SIGINT)
        return task

    monkeypatch.setattr(asyncio.BaseEventLoop, "create_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(drain(items()))
    assert made[-1] == -1


def test_the_clock_runs_while_a_problem_is_solved() -> None:
    _, _, solver = pair()
    solving = solver.begin("1 + 1")
    time.sleep(0.3)

    async def work() -> None:
        async for _ in solving.steps():
            pass

    asyncio.run(work())
    solution = solving.solution()
    assert solution.stats.seconds < 0.25
    time.sleep(0.05)
    assert solving.solution().stats.seconds == solution.stats.seconds

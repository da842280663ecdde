"""How much the server takes on, and that it lets go of what nobody waits for."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import pytest

from specguard.core import Prompt, SolveConfig, Solver, VerifierConfig
from specguard.serve.errors import ApiError
from specguard.serve.limits import Limits
from specguard.serve.metrics import Metrics
from specguard.serve.turns import Place, Turns
from specguard.serve.worker import Flight, Order, Outcome, Piece, Worker
from tests.scripted import Scripted
from tests.serving import serving

ENDLESS, ANSWER = "On and on {}.\n\n", "So \\boxed{7}."


def endless() -> Scripted:
    """Never comes to an end, and never says the same twice."""

    def write(job: Any) -> list[str]:
        time.sleep(0.001)
        return [ENDLESS.format(len(job.prefix))]

    return Scripted("t", write)


def short() -> Scripted:
    return Scripted("t", [ANSWER])


def solver_of(target: Scripted) -> Solver:
    return Solver(None, target, SolveConfig(method="target", max_tokens=10**6))


def order(text: str = "p", **more: Any) -> Order:
    return Order(text, Prompt((1, *map(ord, text)), (1, 1 + len(text))), {}, **more)


@contextmanager
def working(target: Scripted, **limits: Any) -> Iterator[Worker]:
    target.context_limit = 10**6
    with Worker(solver_of(target), Limits(**limits), Metrics()) as worker:
        yield worker


def run(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def soon() -> Any:
        async with asyncio.timeout(30):
            return await work()

    return asyncio.run(soon())


async def outcome(flight: Flight) -> Outcome:
    async with aclosing(flight.events()) as events:
        happened = [event async for _, event in events]
    assert isinstance(happened[-1], Outcome)
    return happened[-1]


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.01)


def test_more_than_there_is_room_for_is_refused_and_room_comes_back() -> None:
    target = endless()

    async def work() -> None:
        flights = [worker.begin([order()]) for _ in range(3)]
        with pytest.raises(ApiError) as refused:
            worker.begin([order()])
        assert refused.value.status == 429
        assert int(refused.value.headers["Retry-After"]) >= 1
        flights[0].cancel()
        await until(lambda: worker.num_open == 2)
        worker.begin([order()]).cancel()
        for flight in flights:
            flight.cancel()
        await until(lambda: worker.num_open == 0)
        assert not target.held

    with working(target, running=2, waiting=1) as worker:
        run(work)


def test_one_that_is_cancelled_before_it_begins_leaves_its_place() -> None:
    async def work() -> None:
        for _ in range(50):
            worker.begin([order()]).cancel()
            await until(lambda: worker.num_open == 0)

    with working(endless(), running=1, waiting=0) as worker:
        run(work)


def test_leaving_a_stream_drops_the_work_within_a_step() -> None:
    target = endless()

    async def work() -> None:
        async with aclosing(worker.begin([order(is_streamed=True)]).events()) as events:
            async for _, event in events:
                assert isinstance(event, Piece)
                break
        await until(lambda: worker.num_open == 0)
        num_jobs = len(target.jobs)
        await asyncio.sleep(0.1)
        assert len(target.jobs) == num_jobs
        assert not target.held

    with working(target) as worker:
        run(work)


def test_a_long_solution_lets_short_ones_in() -> None:
    def write(job: Any) -> list[str]:
        time.sleep(0.001)
        is_long = ord("L") in job.prefix
        return [ENDLESS.format(len(job.prefix)) if is_long else ANSWER]

    async def work() -> None:
        long = worker.begin([order("L")])
        await until(lambda: len(target.jobs) > 2)
        for _ in range(3):
            assert (await outcome(worker.begin([order("s")]))).text == ANSWER
        num_jobs = len(target.jobs)
        await until(lambda: len(target.jobs) > num_jobs)  # and it goes on itself
        long.cancel()

    target = Scripted("t", write)
    with working(target, running=1, turn_tokens=64) as worker:
        run(work)


def test_a_time_limit_holds_in_the_queue_too() -> None:
    async def work() -> None:
        first, second = worker.begin([order()]), worker.begin([order()])
        for flight in (first, second):
            with pytest.raises(ApiError) as refused:
                await outcome(flight)
            assert refused.value.status == 504
        assert (await outcome(worker.begin([order("quick")]))).text == ANSWER

    target = endless()
    write = target.script
    assert callable(write)
    target.script = lambda job: [ANSWER] if ord("q") in job.prefix else write(job)
    with working(target, running=1, seconds=0.3) as worker:
        run(work)


def test_a_worker_that_ends_tells_who_waits() -> None:
    async def work() -> None:
        flight = worker.begin([order()])
        await until(lambda: len(target.jobs) > 2)
        closing = threading.Thread(target=worker.__exit__)
        closing.start()
        with pytest.raises(ApiError, match="stopping"):
            await outcome(flight)
        closing.join()
        assert not target.held

    target = endless()
    target.context_limit = 10**6
    worker = Worker(solver_of(target), Limits(), Metrics()).__enter__()
    run(work)


def test_turns_keep_to_their_number_their_order_and_the_memory() -> None:
    async def work() -> None:
        turns, order_of_turns = Turns(2, memory=10), []

        async def solve(name: str, place: Place, done: asyncio.Event) -> None:
            await turns.wait(place)
            order_of_turns.append(name)
            assert turns.num_running <= 2
            assert turns.num_bytes <= 10
            await done.wait()
            turns.end(place)

        done = {name: asyncio.Event() for name in "abcd"}
        sizes = {"a": 6, "b": 6, "c": 1, "d": 10}
        tasks = [
            asyncio.create_task(solve(name, Place(size), done[name]))
            for name, size in sizes.items()
        ]
        await asyncio.sleep(0)
        assert order_of_turns == ["a"], "c does not overtake b, which waits for memory"
        done["a"].set()
        await asyncio.sleep(0.01)
        assert order_of_turns == ["a", "b", "c"]
        tasks[3].cancel()
        done["b"].set()
        done["c"].set()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(work)


def test_who_holds_memory_goes_on_while_another_waits_for_it() -> None:
    async def work() -> None:
        turns = Turns(1, memory=10)
        paused, big = Place(6), Place(8)
        await turns.wait(paused)
        waiting = asyncio.create_task(turns.wait(big))
        await asyncio.sleep(0)
        await asyncio.wait_for(turns.pass_on(paused), 1)  # and is back at once
        assert not waiting.done()
        turns.end(paused)
        await asyncio.wait_for(waiting, 1)
        assert (turns.num_running, turns.num_waiting, turns.num_bytes) == (1, 0, 8)
        turns.end(big)
        assert (turns.num_running, turns.num_bytes) == (0, 0)

    run(work)


def test_a_request_that_never_fits_the_memory_is_refused_and_others_wait() -> None:
    draft, target = Scripted("d", [ANSWER]), Scripted("t", [ANSWER])
    config = SolveConfig(verifier=VerifierConfig(weights={"log_prob": 1.0}), max_tokens=100)
    needed = 3 * 2 * (3 + 100 + 256) * 8  # of a prompt of three tokens, in both engines
    with serving(Solver(draft, target, config), limits={"memory": needed}) as served:
        assert served.answer("p")["choices"][0]["message"]["content"] == ANSWER
        assert served.answer("p", n=3)["choices"][2]["message"]["content"] == ANSWER
        assert "bytes of keys and values" in served.refusal("p", max_tokens=101)


def test_a_server_whose_work_has_ended_is_not_healthy() -> None:
    with serving(solver_of(short())) as served:
        assert served.client.get("/health").status_code == 200
        served.worker.__exit__()
        assert served.client.get("/health").status_code == 503
        assert "started again" in served.refusal("p", status=503)


def test_a_busy_server_says_when_to_come_back() -> None:
    with serving(solver_of(short()), limits={"running": 1, "waiting": 1}) as served:
        response = served.chat("p", n=3)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        assert served.chat("p", n=2).status_code == 200

"""Where solutions are made: a thread with an event loop of its own, so that HTTP never waits.

What becomes of a solution is told to the event loop that asked for it. Nothing here knows of HTTP.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from specguard.core.config import Author, SolveConfig
from specguard.core.engine import Prompt
from specguard.core.errors import SpecguardError
from specguard.core.progress import Progress, TokensDrawn
from specguard.core.records import Solution, StepRecord
from specguard.core.solver import Solver
from specguard.serve.errors import SERVER, ApiError, internal_error
from specguard.serve.limits import Limits
from specguard.serve.metrics import Metrics
from specguard.serve.reply import Reply
from specguard.serve.tools import ToolCall
from specguard.serve.turns import Place, Turns

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Order:
    """A solution to be made.

    ``num_bytes`` is what it may hold of the memory budget; ``tools`` are names of what the model
    may call; ``is_streamed`` asks for the target's tokens as they come.
    """

    problem: str
    prompt: Prompt
    changes: dict[str, Any]
    num_bytes: int = 0
    stop: tuple[str, ...] = ()
    tools: frozenset[str] = frozenset()
    is_streamed: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is certain; with the step's record, and its settings, where it is decided now."""

    text: str
    step: StepRecord | None = None
    config: SolveConfig | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """A solution, and what the client gets of it: the text, of ``num_tokens``, and calls."""

    solution: Solution
    text: str
    rest: str  # of the text, that no piece has brought
    num_tokens: int
    calls: list[ToolCall] = field(default_factory=list)


Event = Piece | Outcome | ApiError


class _Stopped(Exception):  # noqa: N818 - nothing is wrong
    """A stop sequence in the middle of a step."""


class _Early:
    """Text of a step that is not decided yet, told a little at a time: to wake others costs."""

    def __init__(self, tell: Callable[[Piece], None], seconds: float) -> None:
        self._tell, self._seconds = tell, seconds
        self._text = ""
        self._timer: asyncio.TimerHandle | None = None

    def add(self, text: str) -> None:
        """Text that is certain; it is told soon."""
        self._text += text
        if text and not self._seconds:
            self._flush()
        elif text and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._seconds, self._flush)

    def take(self) -> str:
        """What has not been told, for who tells it with something else."""
        if self._timer is not None:
            self._timer.cancel()
        text, self._text, self._timer = self._text, "", None
        return text

    def _flush(self) -> None:
        self._tell(Piece(self.take()))


class Flight:
    """The solutions of one request, under way; events come with the solution's number.

    Leaving ``events`` early, or `cancel`, drops the work before the next pass of the models.
    """

    def __init__(self, worker: "Worker", num_solutions: int) -> None:
        self._worker, self._num_open = worker, num_solutions
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.tasks: list[asyncio.Task[None]] = []  # of the worker's event loop
        self.is_cancelled = False

    def tell(self, number: int, event: Event) -> None:
        """Called by the worker."""
        with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

    async def events(self) -> AsyncGenerator[tuple[int, Event]]:
        """What becomes of the solutions; an error is the end of all of them."""
        try:
            while self._num_open:
                number, event = await self._events.get()
                if isinstance(event, ApiError):
                    raise event
                self._num_open -= isinstance(event, Outcome)
                yield number, event
        finally:
            self.cancel()

    @property
    def has_more(self) -> bool:
        """Whether ``events`` goes on at once, with an event that is there or with its end."""
        return not (self._num_open and self._events.empty())

    def cancel(self) -> None:
        """Nobody waits for this any more."""
        if not self.is_cancelled:
            self.is_cancelled = True
            self._worker.cancel(self)


class Worker:
    """Makes solutions, several at a time; a context manager. `begin` belongs to one event loop."""

    def __init__(self, solver: Solver, limits: Limits, metrics: Metrics) -> None:
        self._solver, self._limits, self._metrics = solver, limits, metrics
        self._turns = Turns(limits.running, limits.memory)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._work, name="specguard-serve", daemon=True)
        self._lock = threading.Lock()
        self._num_open = 0
        self._mean_seconds = 1.0
        metrics.running.set_function(lambda: self._turns.num_running)
        metrics.waiting.set_function(lambda: self._turns.num_waiting)
        metrics.held.set_function(lambda: self._turns.num_bytes)

    def __enter__(self) -> "Worker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def check(self) -> None:
        """Whether solutions are made.

        Raises:
            ApiError: not any more.
        """
        if not self._thread.is_alive():
            message = "no solutions are made any more: the server has to be started again"
            raise ApiError(503, message, kind=SERVER)

    @property
    def num_open(self) -> int:
        """Solutions that are waited for."""
        return self._num_open

    def begin(self, orders: Sequence[Order]) -> Flight:
        """Put solutions in the queue.

        Raises:
            ApiError: there is no room for them, or nobody to make them.
        """
        self.check()
        most = self._limits.running + self._limits.waiting
        with self._lock:
            if self._num_open + len(orders) > most:
                raise self._busy()
            self._num_open += len(orders)
        flight = Flight(self, len(orders))
        self._loop.call_soon_threadsafe(self._start, flight, orders)
        return flight

    def cancel(self, flight: Flight) -> None:
        """Drop what a flight has under way."""
        with suppress(RuntimeError):  # the loop is closed: nothing is under way
            self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in flight.tasks])

    def _busy(self) -> ApiError:
        seconds = min(60, max(1, round(self._mean_seconds)))
        return ApiError(
            429,
            "too many requests are waiting: try again later",
            kind="rate_limit_error",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(seconds)},
        )

    def _work(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        finally:
            self._loop.close()

    def _start(self, flight: Flight, orders: Sequence[Order]) -> None:
        started = time.perf_counter()
        for number, order in enumerate(orders):
            task = self._loop.create_task(self._run(flight, number, order, started))
            task.add_done_callback(self._ended)  # one may be cancelled before it begins
            flight.tasks.append(task)

    def _ended(self, _: asyncio.Task[None]) -> None:
        with self._lock:
            self._num_open -= 1

    async def _run(self, flight: Flight, number: int, order: Order, started: float) -> None:
        place = Place(order.num_bytes)
        try:
            async with asyncio.timeout(self._limits.seconds):
                await self._turns.wait(place)
                outcome = await self._solve(flight, number, order, place, started)
            self._metrics.solution(outcome.solution)
            flight.tell(number, outcome)
        except TimeoutError:
            self._metrics.failure("timeout")
            message = f"the solution took more than {self._limits.seconds:g} seconds"
            flight.tell(number, ApiError(504, message, kind=SERVER, code="timeout"))
        except SpecguardError as error:
            self._metrics.failure("error")
            _log.warning("%s", ApiError.of(error).body["error"]["message"])
            flight.tell(number, ApiError.of(error))
        except asyncio.CancelledError:
            self._metrics.failure("cancelled")
            flight.tell(number, ApiError(503, "the server is stopping", kind=SERVER))
            raise
        except Exception:
            self._metrics.failure("defect")
            _log.exception("a solution has failed")
            flight.tell(number, internal_error())
        finally:
            self._turns.end(place)
            seconds = time.perf_counter() - started
            self._metrics.seconds.observe(seconds)
            self._mean_seconds += 0.1 * (seconds - self._mean_seconds)

    async def _solve(
        self, flight: Flight, number: int, order: Order, place: Place, started: float
    ) -> Outcome:
        reply = Reply(order.stop, order.tools)
        early = _Early(lambda piece: flight.tell(number, piece), self._limits.piece_seconds)
        method = order.changes.get("method", self._solver.config.method)
        certain: Author = "draft" if method == "draft" else "target"

        def hear(event: Progress) -> None:
            if isinstance(event, TokensDrawn):
                early.add(reply.tokens(event.text, len(event.token_ids)))
                if reply.is_stopped:
                    raise _Stopped

        solving = self._solver.begin(
            order.problem,
            prompt=order.prompt,
            observed=(certain,),
            on_progress=hear if order.is_streamed else None,
            shares_passes=self.num_open > 1,
            **order.changes,
        )
        num_since = 0
        try:
            async with aclosing(solving.steps()) as steps:
                async for step in steps:
                    if step.index == 0:
                        self._metrics.first_step.observe(time.perf_counter() - started)
                    self._metrics.step(step)
                    text = early.take() + reply.step(step)
                    if order.is_streamed:
                        flight.tell(number, Piece(text, step, solving.config))
                    if reply.is_stopped:
                        break
                    num_since += step.num_tokens
                    if num_since >= self._limits.turn_tokens:
                        await self._turns.pass_on(place)
                        num_since = 0
        except _Stopped:
            pass
        finally:
            rest = early.take()
        solving.stop()
        solution, rest = solving.solution(), rest + reply.finish()
        num_tokens = solution.stats.num_tokens + reply.num_early
        return Outcome(solution, reply.text, rest, num_tokens, reply.calls)

"""Jobs of all problems in one event loop: which go together, and when.

Scoring goes first: whoever waits for it is on the way to the next step. Drawing steps, which takes
a pass for every token, waits until nothing else is wanted, and goes on until some jobs have theirs:
these are verified and come back to join the others. Jobs whose step another engine has to write
wait for one another.
"""

import asyncio
import math
import traceback
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from specguard.core.engine import Candidate, GenerateJob, OnTokens, ScoreJob
from specguard.core.errors import SpecguardError

if TYPE_CHECKING:
    from specguard.backends.local.engine import LocalEngine

_SOME = 0.25  # of the jobs that are drawn; so many steps are waited for
_PATIENCE = 16  # times that a kind of drawing waits before it goes first
_PASSES_A_TURN = 8  # before others in the event loop have a turn


@dataclass(slots=True, eq=False)
class Ticket:
    """A job of an engine, and where its result is awaited."""

    engine: "LocalEngine"
    job: GenerateJob | ScoreJob
    future: asyncio.Future[Any]
    state: Any = None  # of the engine, once the job is being drawn
    num_told: Counter[int] = field(default_factory=Counter)

    @property
    def is_dropped(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.future.done()

    @property
    def on_tokens(self) -> OnTokens | None:
        """Who listens while the job is drawn."""
        return self.job.on_tokens if isinstance(self.job, GenerateJob) else None

    def tell(self, drawn: Sequence[Sequence[int]]) -> None:
        """Say what candidates have come to be; what raises is the outcome of the job."""
        listener = self.on_tokens
        if listener is None or self.is_dropped:
            return
        try:
            for candidate, token_ids in enumerate(drawn):
                new = tuple(token_ids[self.num_told[candidate] :])
                if new:
                    self.num_told[candidate] += len(new)
                    listener(candidate, new)
        except Exception as error:
            self.fail(error)

    def give(self, result: Any) -> None:
        """The job is done."""
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        """The job cannot be done."""
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(slots=True)
class _Kind:
    """Generate jobs that can be drawn together, those that wait and those under way."""

    drawing: Any = None
    waiting: list[Ticket] = field(default_factory=list)
    under_way: list[Ticket] = field(default_factory=list)
    num_waits: int = 0

    @property
    def num_wanted(self) -> int:
        """Jobs that want this."""
        return len(self.waiting) + len(self.under_way)


class Batcher:
    """The jobs of one event loop. Make none: `batcher` finds the one of the running loop."""

    def __init__(self) -> None:
        self._open: set[Ticket] = set()
        self._scores: list[Ticket] = []
        self._kinds: dict[Hashable, _Kind] = {}
        self._work: asyncio.Task[None] | None = None

    async def run(self, engine: "LocalEngine", job: GenerateJob | ScoreJob) -> Any:
        """The result of a job; a cancelled one is dropped before the next pass."""
        loop = asyncio.get_running_loop()
        ticket = Ticket(engine, job, loop.create_future())
        if isinstance(job, ScoreJob):
            self._scores.append(ticket)
        else:
            self._kinds.setdefault(engine.kind(job), _Kind()).waiting.append(ticket)
        if self._work is None or self._work.done():
            self._work = loop.create_task(self._run())
            self._work.add_done_callback(_hear_out)
        self._open.add(ticket)
        try:
            return await ticket.future
        finally:
            self._open.discard(ticket)

    async def _run(self) -> None:
        """Work for as long as there is any."""
        try:
            while True:
                self._clean()
                if self._scores:
                    self._score()
                elif self._kinds:
                    await self._draw()
                else:
                    return
                await asyncio.sleep(0)  # who has a result goes on, and brings the next job
        except Exception as error:
            self._fail_all(error)  # it is raised where a result is awaited
        except BaseException as error:
            self._fail_all(error)
            raise
        finally:
            self._work = None  # which holds the event loop that this batcher is found by

    def _score(self) -> None:
        """The scoring jobs of one engine, of the one that has most."""
        engines = Counter(ticket.engine for ticket in self._scores)
        engine = max(engines, key=engines.__getitem__)
        tickets = [ticket for ticket in self._scores if ticket.engine is engine]
        self._scores = [ticket for ticket in self._scores if ticket.engine is not engine]
        failure: Exception | None = None
        try:
            results = engine.score_now([ticket.job for ticket in tickets])  # type: ignore[misc]
        except Exception as error:
            failure = error
        if failure is not None:
            self._each_alone(tickets, failure)
            return
        for ticket, result in zip(tickets, results, strict=True):
            ticket.give(result)

    async def _draw(self) -> None:
        """Passes of what most jobs want, until some of them have their candidates."""
        name = max(
            self._kinds,
            key=lambda name: (
                self._kinds[name].num_waits >= _PATIENCE,
                self._kinds[name].num_wanted,
            ),
        )
        kind = self._kinds[name]
        for other in self._kinds.values():
            other.num_waits += 1
        kind.num_waits = 0
        self._join(kind)
        num_wanted = math.ceil(_SOME * len(kind.under_way))
        num_passes = 0
        while kind.under_way and num_wanted > 0:
            engine = kind.under_way[0].engine
            failure: Exception | None = None
            try:
                done = engine.advance(kind.drawing)
            except Exception as error:
                failure = error
            if failure is not None:
                tickets, kind.under_way, kind.drawing = kind.under_way, [], None
                self._each_alone(tickets, failure)
                break
            listening = [ticket for ticket in kind.under_way if ticket.on_tokens is not None]
            for ticket in listening:
                ticket.tell(ticket.state.token_ids)
            for state, result in done:
                ticket = next(each for each in kind.under_way if each.state is state)
                kind.under_way.remove(ticket)
                num_wanted -= 1
                if isinstance(result, SpecguardError):
                    ticket.fail(result)
                else:
                    ticket.give(result)
            num_passes += 1
            if (listening or num_passes % _PASSES_A_TURN == 0) and num_wanted > 0:
                await asyncio.sleep(0)
                self._clean()
                if self._scores:
                    break
                self._join(kind)
        if not kind.num_wanted:
            self._kinds.pop(name, None)

    def _join(self, kind: _Kind) -> None:
        waiting, kind.waiting = kind.waiting, []
        for ticket in waiting:
            assert isinstance(ticket.job, GenerateJob)
            if kind.drawing is None:
                kind.drawing = ticket.engine.new_drawing(ticket.job)
            try:
                ticket.state = ticket.engine.join(kind.drawing, ticket.job)
            except Exception as error:
                ticket.fail(error)
            else:
                kind.under_way.append(ticket)

    def _each_alone(self, tickets: list[Ticket], error: Exception) -> None:
        """A pass came to nothing: whose fault it was shows when each job is done alone."""
        _let_go(error)
        if len(tickets) == 1:
            [ticket] = tickets
            ticket.engine.release(ticket.job.key)
            ticket.fail(error)
            return
        for ticket in tickets:
            try:
                result = ticket.engine.do_now(ticket.job)
                ticket.tell([each.token_ids for each in result if isinstance(each, Candidate)])
                ticket.give(result)
            except Exception as own:
                _let_go(own)
                ticket.fail(own)

    def _clean(self) -> None:
        """Let go of what nobody waits for."""
        self._scores = [ticket for ticket in self._scores if not ticket.is_dropped]
        for name, kind in list(self._kinds.items()):
            kind.waiting = [ticket for ticket in kind.waiting if not ticket.is_dropped]
            for ticket in [each for each in kind.under_way if each.is_dropped]:
                kind.under_way.remove(ticket)
                ticket.engine.drop(kind.drawing, ticket.state)
                ticket.state = None  # whoever holds the cancelled task holds the ticket
            if not kind.num_wanted:
                del self._kinds[name]

    def _fail_all(self, error: BaseException) -> None:
        """Nobody is to wait for ever."""
        kinds, self._scores, self._kinds = self._kinds, [], {}
        for kind in kinds.values():
            for ticket in kind.under_way:
                ticket.engine.drop(kind.drawing, ticket.state)
        for ticket in self._open:
            if isinstance(error, Exception):
                ticket.fail(error)
            else:
                ticket.future.cancel()


def _let_go(error: BaseException | None) -> None:
    """What a pass had in its hands when it failed is not to be kept as long as the error is."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _hear_out(work: asyncio.Task[None]) -> None:
    """An interruption has left the event loop by itself: asyncio need not report it, too."""
    if not work.cancelled():
        work.exception()


_batchers: WeakKeyDictionary[asyncio.AbstractEventLoop, Batcher] = WeakKeyDictionary()


def batcher() -> Batcher:
    """The one of the running event loop."""
    loop = asyncio.get_running_loop()
    if loop not in _batchers:
        _batchers[loop] = Batcher()
    return _batchers[loop]

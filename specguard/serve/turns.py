"""Whose turn it is: so many solutions at a time, within a memory budget, none for too long.

Belongs to one event loop. Knows nothing of what is done in a turn.
"""

import asyncio
from collections import deque


class Place:
    """Of one solution, in the queue or at work; ``num_bytes`` is what it may hold until its end."""

    __slots__ = ("holds_memory", "num_bytes", "turn")

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.holds_memory = False
        self.turn: asyncio.Future[None] | None = None


class Turns:
    """Gives turns in the order in which they are asked for.

    One that has begun holds its memory through its pauses. While the first that has not waits for
    memory, those that hold theirs go on, and nobody else gets any.
    """

    def __init__(self, num_running: int, memory: int | None = None) -> None:
        self._num_running, self._memory = num_running, memory
        self._waiting: deque[Place] = deque()
        self._running: set[Place] = set()
        self.num_bytes = 0  # that are held

    @property
    def num_running(self) -> int:
        """Solutions at work."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Solutions that wait for a turn, the first or a further one."""
        return len(self._waiting)

    async def wait(self, place: Place) -> None:
        """Until it is this one's turn."""
        place.turn = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._admit()
        await place.turn

    async def pass_on(self, place: Place) -> None:
        """Let others go first, if there are any."""
        if self._waiting:
            self._running.discard(place)
            await self.wait(place)

    def end(self, place: Place) -> None:
        """It needs no more turns, wherever it stands."""
        self._running.discard(place)
        if place in self._waiting:
            self._waiting.remove(place)
        if place.holds_memory:
            self.num_bytes -= place.num_bytes
            place.holds_memory = False
        self._admit()

    def _admit(self) -> None:
        is_short = False  # somebody waits for memory
        for place in list(self._waiting):
            if len(self._running) >= self._num_running:
                return
            if not place.holds_memory:
                has_room = self._memory is None or self.num_bytes + place.num_bytes <= self._memory
                if is_short or not has_room:
                    is_short = True
                    continue
                place.holds_memory = True
                self.num_bytes += place.num_bytes
            self._waiting.remove(place)
            self._running.add(place)
            assert place.turn is not None
            if not place.turn.done():
                place.turn.set_result(None)

"""Keys and values of many sequences in one tensor: passes of a fixed shape find them in place.

Knows nothing of passes.
"""

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from specguard.backends.pytorch.kv import KVBuffer

_FIRST_SLOTS, _FIRST_CAPACITY = 4, 1024
_SPARE = 8  # columns; one is enough, and so many keep what comes behind aligned


class KVShape(NamedTuple):
    """What a model writes for a token."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    number_type: torch.dtype
    device: torch.device


class SlotPool:
    """``data`` [layers, 2, slots, kv_heads, columns, dim]: a slot for each sequence.

    All slots are as long as the longest sequence needs. Numbers in unwritten columns are finite,
    so that a weight of 0 takes them away. Columns from ``capacity`` on are nobody's: what a pass of
    fixed shape computes for no one goes there. Where more slots or columns are needed, ``data``
    becomes another tensor; ``before_resize`` is called first, to let go of the old one.
    """

    def __init__(self, shape: KVShape) -> None:
        self.shape = shape
        self.before_resize: Callable[[], None] = lambda: None
        self._slots: WeakValueDictionary[int, Slot] = WeakValueDictionary()
        self.data = self._zeros(0, _FIRST_CAPACITY)

    @property
    def num_slots(self) -> int:
        """Slots that there is room for."""
        return self.data.shape[2]

    @property
    def capacity(self) -> int:
        """Columns that a sequence may have."""
        return self.data.shape[4] - _SPARE

    def new_slot(self) -> "Slot":
        """The first slot that nobody has any more, emptied."""
        number = next(number for number in range(self.num_slots + 1) if number not in self._slots)
        with torch.inference_mode():
            if number == self.num_slots:
                self._resize(max(_FIRST_SLOTS, 2 * self.num_slots), self.capacity)
            slot = self._slots[number] = Slot(self, number)
            slot.look()
            slot.clear()
        return slot

    def make_room(self, columns: int) -> None:
        """So many columns in each slot."""
        if columns > self.capacity:
            self._resize(self.num_slots, 1 << (columns - 1).bit_length())

    def _resize(self, num_slots: int, capacity: int) -> None:
        self.before_resize()
        old, held = self.data, self.capacity
        self.data = self._zeros(num_slots, capacity)
        self.data[:, :, : old.shape[2], :, :held] = old[..., :held, :]
        for slot in self._slots.values():
            slot.look()

    def _zeros(self, num_slots: int, capacity: int) -> Tensor:
        layers, heads, dim, number_type, device = self.shape
        columns = capacity + _SPARE
        return torch.zeros(
            layers, 2, num_slots, heads, columns, dim, dtype=number_type, device=device
        )


class Slot(KVBuffer):
    """One sequence of a pool; whoever drops it gives it back."""

    __slots__ = ("_pool", "number")

    def __init__(self, pool: SlotPool, number: int) -> None:
        super().__init__(pool.shape.num_layers)
        self._pool, self.number = pool, number
        self._widths = pool.shape.head_dim, pool.shape.head_dim

    def look(self) -> None:
        """Find oneself in the pool's tensor."""
        self._look_at(self._pool.data[:, :, self.number])

    def clear(self) -> None:
        """Take away what another sequence has left."""
        assert self.data is not None
        self.data.zero_()

    def copy_from(self, other: KVBuffer, length: int) -> None:
        """Become a copy of another slot's first columns."""
        self._pool.make_room(length)
        assert self.data is not None
        assert other.data is not None
        self.data[:, :, :, :length] = other.data[:, :, :, :length]

    def _make_room(self, key: Tensor, value: Tensor, held: int, stop: int) -> None:
        self._pool.make_room(stop)

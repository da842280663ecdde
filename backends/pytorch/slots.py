"""Keys and values of many sequences in one tensor: passes of a fixed shape find them in place.

Knows nothing of passes.
"""

from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from specguard.backends.pytorch.kv import KVBuffer

_FIRST_CAPACITY = 1024


class KVShape(NamedTuple):
    """What a model writes for a token."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    number_type: torch.dtype
    device: torch.device


class SlotPool:
    """``data`` [layers, 2, slots, kv_heads, capacity, dim]: a slot for each sequence.

    All slots are as long as the longest sequence needs. Numbers in unwritten columns are finite,
    so that a weight of 0 takes them away. The last column is nobody's: what a pass of fixed shape
    computes for no one goes there. Where more slots or columns are needed, ``data`` becomes another
    tensor.
    """

    def __init__(self, shape: KVShape) -> None:
        self.shape = shape
        self._slots: WeakValueDictionary[int, Slot] = WeakValueDictionary()
        self.data = self._zeros(0, _FIRST_CAPACITY)

    @property
    def num_slots(self) -> int:
        """Slots that there is room for."""
        return self.data.shape[2]

    @property
    def capacity(self) -> int:
        """Columns of a slot, the last one among them."""
        return self.data.shape[4]

    def new_slot(self) -> "Slot":
        """The first slot that nobody has any more, emptied."""
        number = next(number for number in range(self.num_slots + 1) if number not in self._slots)
        slot = Slot(self, number)
        self._slots[number] = slot
        with torch.inference_mode():
            if number == self.num_slots:
                self._resize(max(1, 2 * self.num_slots), self.capacity)
            slot.look()
            slot.clear()
        return slot

    def make_room(self, columns: int) -> None:
        """So many columns, and the last one."""
        if columns >= self.capacity:
            self._resize(self.num_slots, 1 << columns.bit_length())

    def _resize(self, num_slots: int, capacity: int) -> None:
        old = self.data
        self.data = self._zeros(num_slots, capacity)
        self.data[:, :, : old.shape[2], :, : old.shape[4]] = old
        for slot in self._slots.values():
            slot.look()

    def _zeros(self, num_slots: int, capacity: int) -> Tensor:
        layers, heads, dim, number_type, device = self.shape
        return torch.zeros(
            layers, 2, num_slots, heads, capacity, dim, dtype=number_type, device=device
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

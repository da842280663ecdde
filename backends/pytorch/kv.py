"""Keys and values: a growing buffer per sequence, and the cache that a model writes it through."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache

from specguard.backends.sequence import BufferedSequence

_FIRST_CAPACITY = 256


class KVBuffer:
    """Per layer keys and values [rows, kv_heads, capacity, dim], columns filled from the left.

    ``num_users`` counts the sequences that share the buffer; who writes must be the only one.
    """

    __slots__ = ("keys", "num_users", "values")

    def __init__(self, num_layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.num_users = 1

    @property
    def num_bytes_per_token(self) -> int:
        """What a column of one row takes, once something is written."""
        held = [part[0, :, 0] for part in self.keys + self.values if part is not None]
        return sum(part.numel() * part.element_size() for part in held)

    def write(self, layer: int, start: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store columns [rows, kv_heads, n, dim] from ``start`` on; return all up to them."""
        stop = start + key.shape[2]
        keys = self.keys[layer] = _with_room(self.keys[layer], key, start, stop)
        values = self.values[layer] = _with_room(self.values[layer], value, start, stop)
        keys[:, :, start:stop] = key
        values[:, :, start:stop] = value
        return keys[:, :, :stop], values[:, :, :stop]

    def copy_columns(self, start: int, source: "KVBuffer", row: int, columns: Tensor) -> None:
        """Write one row's columns of another buffer, or of this one, from ``start`` on."""
        for layer, (key, value) in enumerate(zip(source.keys, source.values, strict=True)):
            if key is not None and value is not None:
                self.write(
                    layer,
                    start,
                    key[row : row + 1].index_select(2, columns),
                    value[row : row + 1].index_select(2, columns),
                )

    def share(self) -> Self:
        """The same buffer for one more sequence."""
        self.num_users += 1
        return self

    def release(self) -> None:
        """One sequence fewer uses it."""
        self.num_users -= 1

    def own(self, length: int) -> "KVBuffer":
        """This buffer, or a copy of its first ``length`` columns where it is shared."""
        if self.num_users == 1:
            return self
        self.release()
        copied = KVBuffer(len(self.keys))
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            if key is not None and value is not None and length:
                copied.write(layer, 0, key[:, :, :length], value[:, :, :length])
        return copied


def _with_room(held: Tensor | None, new: Tensor, start: int, stop: int) -> Tensor:
    if held is not None and held.shape[2] >= stop:
        return held
    capacity = max(_FIRST_CAPACITY, 2 * stop)
    rows, heads, _, dim = new.shape
    grown = new.new_empty(rows, heads, capacity, dim)
    if held is not None:
        grown[:, :, :start] = held[:, :, :start]
    return grown


@dataclass(frozen=True, slots=True)
class Part:
    """Columns of one row of a buffer: so many from the left, or the given ones."""

    buffer: KVBuffer
    row: int
    columns: int | Tensor

    @property
    def num_columns(self) -> int:
        """How many there are."""
        return self.columns if isinstance(self.columns, int) else len(self.columns)


def stack(parts: Sequence[Part]) -> KVBuffer:
    """One buffer with a row for each part, filled from the left and padded with zeros."""
    stacked = KVBuffer(len(parts[0].buffer.keys))
    width = max(part.num_columns for part in parts)
    for layer in range(len(stacked.keys)):
        for held in "keys", "values":
            wholes = [getattr(part.buffer, held)[layer] for part in parts]
            like = next((whole for whole in wholes if whole is not None), None)
            if like is None or not width:
                continue
            _, heads, _, dim = like.shape
            rows = like.new_empty(len(parts), heads, max(_FIRST_CAPACITY, 2 * width), dim)
            for row, part, whole in zip(rows, parts, wholes, strict=True):
                length = part.num_columns
                row[:, length:width] = 0
                if isinstance(part.columns, int):
                    row[:, :length] = whole[part.row, :, :length] if length else 0
                else:
                    torch.index_select(whole[part.row], 1, part.columns, out=row[:, :length])
            getattr(stacked, held)[layer] = rows
    return stacked


TorchSequence = BufferedSequence[KVBuffer]


@dataclass(slots=True)
class Handle:
    """Where a candidate's KV lies, and its warped distributions [n, V] if they were kept."""

    sequence: TorchSequence
    version: int
    buffer: KVBuffer
    row: int
    columns: list[int]
    distributions: Tensor | None = None


class PassCache(Cache):  # type: ignore[misc]
    """The cache that a model sees in one pass: writes go to a buffer, from one column on."""

    def __init__(self, buffer: KVBuffer, start: int) -> None:
        super().__init__(layers=[])
        self.buffer = buffer
        self.start = start
        self.num_updates = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new columns; all columns so far come back."""
        self.num_updates += 1
        return self.buffer.write(layer_idx, self.start, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before this pass."""
        return self.start

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns with this pass, and the first one's offset."""
        return self.start + query_length, 0

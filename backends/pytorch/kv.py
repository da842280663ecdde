"""Keys and values: a growing buffer per sequence, and the cache that a model writes it through."""

from typing import Any, Self

from torch import Tensor
from transformers import Cache

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

    def rows(self, rows: Tensor, length: int) -> "KVBuffer":
        """A buffer with the first ``length`` columns of some rows."""
        chosen = KVBuffer(len(self.keys))
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            if key is not None and value is not None:
                chosen.write(layer, 0, key[rows, :, :length], value[rows, :, :length])
        return chosen

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


def stack_rows(buffers: list[KVBuffer], lengths: list[int]) -> KVBuffer:
    """One buffer of several rows, each filled from the left and padded with zeros."""
    stacked = KVBuffer(len(buffers[0].keys))
    width = max(lengths)
    for layer in range(len(stacked.keys)):
        for held, targets in ("keys", stacked.keys), ("values", stacked.values):
            parts = [getattr(buffer, held)[layer] for buffer in buffers]
            like = next((part for part in parts if part is not None), None)
            if like is None or not width:
                continue
            _, heads, _, dim = like.shape
            rows = like.new_empty(len(parts), heads, max(_FIRST_CAPACITY, 2 * width), dim)
            for i, (part, length) in enumerate(zip(parts, lengths, strict=True)):
                if length:
                    rows[i, :, :length] = part[0, :, :length]
                rows[i, :, length:width] = 0
            targets[layer] = rows
    return stacked


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

"""Keys and values of one sequence, layer by layer: MLX writes in place what nobody else reads."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

_FIRST_CAPACITY = 256


class KVBuffer:
    """Per layer keys and values [1, kv_heads, capacity, dim], columns filled from the left.

    One tensor for all layers, as on torch, would be copied at every write here: a layer's columns
    are still read when the next layer's are written.
    """

    __slots__ = ("keys", "values")

    def __init__(self, num_layers: int) -> None:
        self.keys: list[Any] = [None] * num_layers
        self.values: list[Any] = [None] * num_layers

    @property
    def num_bytes_per_token(self) -> int:
        """What a column takes, once something is written."""
        return sum(array.nbytes // array.shape[2] for array in self.arrays())

    def write(self, layer: int, start: int, key: mx.array, value: mx.array) -> None:
        """Store columns [1, kv_heads, n, dim] from ``start`` on."""
        self.keys[layer] = _written(self.keys[layer], key, start)
        self.values[layer] = _written(self.values[layer], value, start)

    def read(self, layer: int, stop: int) -> tuple[mx.array, mx.array]:
        """The first ``stop`` columns."""
        return self.keys[layer][..., :stop, :], self.values[layer][..., :stop, :]

    def copy_columns(self, start: int, columns: Sequence[int]) -> None:
        """Write these columns again from ``start`` on."""
        wanted = mx.array(columns)
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            self.write(layer, start, mx.take(key, wanted, axis=2), mx.take(value, wanted, axis=2))
        mx.async_eval(self.arrays())  # another thread may use them before the next pass

    def copy_from(self, other: "KVBuffer", length: int) -> None:
        """Become a copy of another buffer's first columns."""
        for layer in range(len(self.keys)):
            self.write(layer, 0, *other.read(layer, length))
        mx.async_eval(self.arrays())

    def arrays(self) -> list[mx.array]:
        """All keys and values, to be evaluated."""
        return [array for array in self.keys + self.values if array is not None]


def _written(held: mx.array | None, new: mx.array, start: int) -> mx.array:
    stop = start + new.shape[2]
    if held is None or held.shape[2] < stop:
        heads, dim = new.shape[1], new.shape[3]
        grown = mx.zeros((1, heads, max(_FIRST_CAPACITY, 2 * stop), dim), new.dtype)
        if held is not None and start:
            grown[..., :start, :] = held[..., :start, :]
        held = grown
    held[..., start:stop, :] = new
    return held

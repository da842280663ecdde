"""Keys and values of one sequence, layer by layer."""

from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx

_FIRST_CAPACITY = 256


class KVBuffer:
    """Per layer keys and values [1, kv_heads, capacity, dim], columns filled from the left.

    Two buffers may hold the same columns: MLX copies an array that is written to while another
    array, a slice included, still lives on its memory, and writes in place otherwise.
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

    def move_columns(self, start: int, columns: Sequence[int]) -> None:
        """Copy columns to the places from ``start`` on."""
        wanted = mx.array(columns)
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            self.write(layer, start, mx.take(key, wanted, axis=2), mx.take(value, wanted, axis=2))

    def arrays(self) -> list[mx.array]:
        """All keys and values, to be evaluated."""
        return [array for array in self.keys + self.values if array is not None]

    def share(self) -> Self:
        """A second buffer over the same columns."""
        shared = type(self)(len(self.keys))
        # Writing to an array changes the object; a slice of everything is another one, not a copy.
        shared.keys = [None if array is None else array[:] for array in self.keys]
        shared.values = [None if array is None else array[:] for array in self.values]
        mx.async_eval(shared.arrays())  # lazy arrays belong to the thread that made them
        return shared

    def release(self) -> None:
        """Nothing to do: the arrays go with their last reader."""

    def own(self, length: int) -> Self:
        """This buffer: MLX itself copies what others still read."""
        return self


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

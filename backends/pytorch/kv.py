"""Keys and values of one sequence in one tensor, and the cache through which a model writes it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

_FIRST_CAPACITY = 256


class KVBuffer:
    """Keys and values [layers, 2, kv_heads, capacity, dim], columns filled from the left.

    The shape is known once the first column is written; ``dim`` is that of the wider ones where
    keys and values differ.
    """

    __slots__ = ("__weakref__", "_layers", "_num_layers", "_widths", "data")

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._widths = (0, 0)  # of keys and of values
        self.data: Tensor | None = None
        self._layers: list[tuple[Tensor, Tensor]] = []  # views [1, kv_heads, capacity, dim]

    @property
    def num_bytes_per_token(self) -> int:
        """What a column takes, once something is written."""
        if self.data is None:
            return 0
        return self.data[:, :, :, 0].numel() * self.data.element_size()

    def write(self, layer: int, start: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store columns [kv_heads, n, dim] from ``start`` on; all of the layer up to them.

        Returned are views [1, kv_heads, columns, dim].
        """
        stop = start + key.shape[1]
        self._make_room(key, value, start, stop)
        keys, values = self._layers[layer]
        keys[0, :, start:stop] = key
        values[0, :, start:stop] = value
        return keys[:, :, :stop], values[:, :, :stop]

    def copy_columns(self, start: int, columns: Sequence[int]) -> None:
        """Write these columns again from ``start`` on."""
        assert self.data is not None
        wanted = torch.tensor(columns).to(self.data.device, non_blocking=True)
        self.data[:, :, :, start : start + len(columns)] = self.data.index_select(3, wanted)

    def copy_from(self, other: "KVBuffer", length: int) -> None:
        """Become a copy of another buffer's first columns."""
        assert other.data is not None
        self._widths = other._widths
        self._allocate(other.data, length)
        assert self.data is not None
        self.data[:, :, :, :length] = other.data[:, :, :, :length]

    def _make_room(self, key: Tensor, value: Tensor, held: int, stop: int) -> None:
        old = self.data
        if old is not None and old.shape[3] >= stop:
            return
        if old is None:
            self._widths = key.shape[2], value.shape[2]
            shape = self._num_layers, 2, key.shape[0], 0, max(self._widths)
            self._allocate(key.new_empty(shape), stop)
            return
        self._allocate(old, 2 * stop)
        assert self.data is not None
        self.data[:, :, :, :held] = old[:, :, :, :held]

    def _allocate(self, like: Tensor, columns: int) -> None:
        layers, _, heads, _, dim = like.shape
        capacity = max(_FIRST_CAPACITY, columns)
        self._look_at(like.new_empty(layers, 2, heads, capacity, dim))

    def _look_at(self, data: Tensor) -> None:
        self.data = data
        keys, values = self._widths
        self._layers = [(part[0:1, ..., :keys], part[1:2, ..., :values]) for part in data]


class PassCache(Cache):  # type: ignore[misc]
    """The cache that a model with its own attention sees in one pass over one row.

    Without a buffer, for the attention of this package, new keys and values come back as they are:
    it stores them itself.
    """

    def __init__(self, start: int = 0, buffer: KVBuffer | None = None) -> None:
        super().__init__(layers=[])
        self.buffer = buffer
        self.start = start
        self.num_updates = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new columns; all columns so far come back."""
        self.num_updates += 1
        if self.buffer is None:
            return key_states, value_states
        return self.buffer.write(layer_idx, self.start, key_states[0], value_states[0])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns before this pass."""
        return self.start

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns with this pass, and the first one's offset."""
        return self.start + query_length, 0

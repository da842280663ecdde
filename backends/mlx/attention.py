"""Attention of one pass over mlx-lm's models, row by row, and a step's attention blocks.

mlx-lm's models call a function of their module. `install` puts one in its place that looks at the
cache it is given: a `LayerCache` brings the pass, and any other cache gets what mlx-lm does.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import base

from specguard.backends.local.layer import Row, RowCapture
from specguard.backends.mlx.kv import KVBuffer
from specguard.core.engine import AttentionBlock
from specguard.core.errors import SpecguardError

_FUNCTION = "scaled_dot_product_attention"
_mlx_lm_attention = base.scaled_dot_product_attention


@dataclass(slots=True)
class DeviceCapture:
    """A row's capture on the device: it begins at ``first_layer``.

    ``sources`` and ``sinks`` [c + n - 1, 1] are 1.0 in their columns, the step's own are neither.
    """

    wanted: RowCapture
    first_layer: int
    queries: mx.array
    columns: mx.array
    sources: mx.array
    sinks: mx.array
    layers: list[tuple[mx.array, mx.array, mx.array]] = field(default_factory=list)

    @classmethod
    def of(cls, wanted: RowCapture, first_layer: int) -> "DeviceCapture":
        """A capture as the device wants it."""
        is_source = wanted.capture.is_source
        columns = np.zeros((2, len(wanted.columns), 1), dtype=np.float32)
        columns[0, : len(is_source), 0] = is_source
        columns[1, : len(is_source), 0] = ~is_source
        return cls(
            wanted,
            first_layer,
            mx.array(wanted.queries),
            mx.array(wanted.columns),
            mx.array(columns[0]),
            mx.array(columns[1]),
        )

    def is_whole(self, row: Row) -> bool:
        """Whether all of the row's queries are read, and nothing lies between them."""
        return len(self.wanted.queries) == row.num_queries and row.visible is None

    def finish(self) -> None:
        """Hand the blocks over."""
        self.wanted.blocks += [AttentionBlock(*map(np.array, layer)) for layer in self.layers]


@dataclass(slots=True)
class PlacedRow:
    """A row, its queries among those of the pass, what they see, and what is read of them."""

    row: Row
    buffer: KVBuffer
    first: int
    mask: mx.array | str | None
    captures: list[DeviceCapture]

    @classmethod
    def of(cls, row: Row, first: int, num_layers: int) -> "PlacedRow":
        """A row as the device wants it."""
        assert isinstance(row.buffer, KVBuffer)
        mask: mx.array | str | None = None
        if row.visible is not None:
            seen = np.ones((row.num_queries, row.stop), dtype=np.bool_)
            seen[:, row.base :] = row.visible
            mask = mx.array(seen)
        elif row.num_queries > 1:
            mask = "causal"
        captures = [
            DeviceCapture.of(capture, num_layers - capture.capture.num_layers)
            for capture in row.captures
        ]
        return cls(row, row.buffer, first, mask, captures)


@dataclass(slots=True)
class AttentionPass:
    """One forward pass: its rows, and the position of the first token of every slot.

    The N tokens are slots of one token each, or all of them one slot.
    """

    rows: list[PlacedRow]
    offset: int | mx.array
    num_layers_seen: int = 0


class LayerCache:
    """What a layer of mlx-lm takes for its cache; it also stands for the mask."""

    def __init__(self, attention: AttentionPass, layer: int) -> None:
        self._pass = attention
        self._layer = layer
        self._written: tuple[Any, Any] = (None, None)

    @property
    def offset(self) -> int | mx.array:
        """Position of the first token of every slot."""
        return self._pass.offset

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> AttentionPass:
        """The pass itself: who sees what is its business."""
        if window_size is not None:
            raise _refusal("has sliding-window layers")
        return self._pass

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store the new keys and values [slots, kv_heads, length, dim]."""
        flat_keys, flat_values = _flat(keys), _flat(values)
        for placed in self._pass.rows:
            placed.buffer.write(
                self._layer,
                placed.row.start,
                _part(flat_keys, placed, self._pass),
                _part(flat_values, placed, self._pass),
            )
        self._written = keys, values
        return keys, values

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Any
    ) -> mx.array:
        """Attention output [slots, heads, length, dim] of queries of that shape."""
        if mask is not self._pass:
            raise _refusal("makes attention masks of its own")
        if keys is not self._written[0] or values is not self._written[1]:
            raise _refusal("changes keys and values behind its cache")
        self._pass.num_layers_seen += 1
        flat = _flat(queries)
        outputs = []
        for placed in self._pass.rows:
            query = _part(flat, placed, self._pass)
            key, value = placed.buffer.read(self._layer, placed.row.stop)
            outputs.append(self._attend_row(query, key, value, scale, placed))
        output = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)
        return output if queries.shape[2] == output.shape[2] else output.swapaxes(0, 2)

    def _attend_row(
        self, query: mx.array, key: mx.array, value: mx.array, scale: float, placed: PlacedRow
    ) -> mx.array:
        captures = [one for one in placed.captures if self._layer >= one.first_layer]
        if len(captures) == 1 and captures[0].is_whole(placed.row):
            # One softmax for the output and for what is read of it.
            weights = _weights(query, key, scale, placed.row.num_queries)
            captures[0].layers.append(attention_block(weights, captures[0]))
            heads, n, width = weights.shape
            grouped = weights.reshape(key.shape[1], -1, width)
            summed = grouped @ value[0].astype(mx.float32)
            return summed.reshape(1, heads, n, -1).astype(query.dtype)
        for capture in captures:
            own_query = mx.take(query, capture.queries, axis=2)
            own_key = mx.take(key, capture.columns, axis=2)
            weights = _weights(own_query, own_key, scale, len(capture.wanted.queries))
            capture.layers.append(attention_block(weights, capture))
        output: mx.array = mx.fast.scaled_dot_product_attention(
            query, key, value, scale=scale, mask=placed.mask
        )
        return output


def install(model: nn.Module) -> None:
    """Make the modules of a model dispatch on their cache; more than once does no harm."""
    for module in model.modules():
        namespace = getattr(type(module).__call__, "__globals__", {})
        if namespace.get(_FUNCTION) is _mlx_lm_attention:
            namespace[_FUNCTION] = _dispatch


def _dispatch(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    if not isinstance(cache, LayerCache):
        return _mlx_lm_attention(queries, keys, values, cache, scale, mask, sinks)
    if sinks is not None:
        raise _refusal("has attention sinks")
    return cache.attend(queries, keys, values, scale, mask)


def _weights(query: mx.array, key: mx.array, scale: float, n: int) -> mx.array:
    """Softmax weights [heads, n, c + n - 1] in float32 of causal queries [1, heads, n, dim]."""
    _, heads, _, dim = query.shape
    _, kv_heads, width, _ = key.shape
    grouped = (query.astype(mx.float32) * scale).reshape(kv_heads, -1, dim)
    scores = (grouped @ key[0].astype(mx.float32).swapaxes(1, 2)).reshape(heads, n, width)
    # Only the step's own columns can lie in a row's future.
    future = mx.arange(n) > mx.arange(n)[:, None]
    scores[..., width - n :] = mx.where(future, -mx.inf, scores[..., width - n :])
    return mx.softmax(scores, axis=-1)


def attention_block(
    weights: mx.array, capture: DeviceCapture
) -> tuple[mx.array, mx.array, mx.array]:
    """The block of one layer from its softmax weights [heads, n, c + n - 1].

    Per head and row: drop weights below epsilon, drop sinks, renormalise; a row left empty becomes
    its own token. Then the heads are averaged: ``source_mass`` [n], ``sink_mass`` [n] and ``step``
    [n, n] as `AttentionBlock` has them, in float32.
    """
    _, n, width = weights.shape
    sink_mass = (weights @ capture.sinks)[..., 0].mean(0)
    weights = _drop_below(weights, mx.array(capture.wanted.capture.epsilon))
    source_mass = (weights @ capture.sources)[..., 0]  # [heads, n]
    # Position c-1 is the step's first column and the context's last: counted there if a source,
    # dropped if a sink.
    step = mx.where(mx.arange(n) == 0, 0.0, weights[..., width - n :])  # [heads, n, n]
    total = source_mass + step.sum(-1)
    is_empty = total == 0
    total = mx.where(is_empty, 1.0, total)
    source_mass, step = source_mass / total, step / total[..., None]
    itself = mx.eye(n)
    if capture.wanted.is_last_source:
        is_first = mx.arange(n) == 0
        source_mass = mx.where(is_empty & is_first, 1.0, source_mass)
        itself = mx.where(is_first, 0.0, itself)
    step = step + itself * is_empty[..., None]
    return source_mass.mean(0), sink_mass, step.mean(0)


@partial(mx.compile, shapeless=True)
def _drop_below(weights: mx.array, epsilon: mx.array) -> mx.array:
    return mx.where(weights < epsilon, 0.0, weights)


def _flat(states: mx.array) -> mx.array:
    """[slots, heads, length, dim] as [1, heads, N, dim]; slots or length are 1."""
    return states if states.shape[0] == 1 else states.swapaxes(0, 2)


def _part(flat: mx.array, placed: PlacedRow, attention: AttentionPass) -> mx.array:
    if len(attention.rows) == 1:
        return flat
    return flat[:, :, placed.first : placed.first + placed.row.num_queries]


def _refusal(reason: str) -> SpecguardError:
    return SpecguardError(
        f"the model {reason}, which this backend cannot express",
        "choose a model with plain attention in every layer",
    )

"""Attention for one pass over mlx-lm's models: shared prefixes, and a step's attention blocks.

mlx-lm's models call a function of their module. `install` puts one in its place that looks at the
cache it is given: a `LayerCache` brings the pass, and any other cache gets what mlx-lm does.
"""

from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import base

from specguard.backends.mlx.kv import KVBuffer
from specguard.core.errors import SpecguardError
from specguard.core.model import Capture

_FUNCTION = "scaled_dot_product_attention"
_mlx_lm_attention = base.scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class RowCapture:
    """What to read of a slot's attention to c context tokens and its own n, from a layer on.

    ``sources`` and ``sinks`` [c + n - 1, 1] are 1.0 in their columns, the step's own are neither.
    ``blocks`` collects (source_mass, sink_mass, step) layer by layer.
    """

    sources: mx.array
    sinks: mx.array
    is_last_source: bool
    epsilon: float
    first_layer: int
    blocks: list[tuple[mx.array, mx.array, mx.array]] = field(default_factory=list)

    @classmethod
    def of(cls, capture: Capture, num_rows: int, first_layer: int) -> "RowCapture":
        """A capture as the device wants it, for a step of ``num_rows`` tokens."""
        context = len(capture.is_source)
        columns = np.zeros((2, context + num_rows - 1, 1), dtype=np.float32)
        columns[0, :context, 0] = capture.is_source
        columns[1, :context, 0] = ~capture.is_source
        return cls(
            mx.array(columns[0]),
            mx.array(columns[1]),
            bool(capture.is_source[-1]),
            float(capture.epsilon),
            first_layer,
        )


@dataclass(slots=True)
class Row:
    """One sequence's share of a pass: its slots in the batch and the columns that it may see.

    A row is one slot of ``length`` tokens, causal, or several, one for each of its candidates, told
    apart by ``mask`` [slots * length, columns]. ``start`` is the first column written, slot after
    slot. ``captures`` are empty or one for each slot.
    """

    buffer: KVBuffer
    start: int
    num_slots: int = 1
    length: int = 1
    mask: mx.array | None = None
    captures: list[RowCapture] = field(default_factory=list)


@dataclass(slots=True)
class AttentionPass:
    """One forward pass: its rows, and the offset of the slots' positions (one, or one each).

    ``placed_rows`` are the rows, each with its first slot in the batch.
    """

    rows: list[Row]
    offset: int | mx.array
    num_layers_seen: int = 0
    placed_rows: list[tuple[Row, int]] = field(init=False)

    def __post_init__(self) -> None:
        firsts = accumulate((row.num_slots for row in self.rows), initial=0)
        self.placed_rows = list(zip(self.rows, firsts, strict=False))


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
        for row, first in self._pass.placed_rows:
            row.buffer.write(
                self._layer, row.start, _fold(keys, row, first), _fold(values, row, first)
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
        outputs = []
        for row, first in self._pass.placed_rows:
            query = _fold(queries, row, first)
            num_new = row.num_slots * row.length
            key, value = row.buffer.read(self._layer, row.start + num_new)
            if row.captures and self._layer >= row.captures[0].first_layer:
                output = _captured_slots(query, key, value, scale, row)
            else:
                is_causal = row.mask is None and num_new > 1
                output = mx.fast.scaled_dot_product_attention(
                    query, key, value, scale=scale, mask="causal" if is_causal else row.mask
                )
            outputs.append(output)
        if len(outputs) == 1:
            return _unfold(outputs[0], self._pass.rows[0], queries.shape[2])
        return mx.concatenate(
            [
                _unfold(output, row, queries.shape[2])
                for output, row in zip(outputs, self._pass.rows, strict=True)
            ]
        )


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


def _captured_slots(
    query: mx.array, key: mx.array, value: mx.array, scale: float, row: Row
) -> mx.array:
    """Captured attention of each slot to the row's context and the slot's own columns."""
    outputs = []
    for slot, capture in enumerate(row.captures):
        first = row.start + slot * row.length
        n = len(capture.sources) - row.start
        own_query = query[:, :, slot * row.length : slot * row.length + n]
        own_key, own_value = (
            mx.concatenate([part[:, :, : row.start], part[:, :, first : first + n]], axis=2)
            if slot
            else part[:, :, : row.start + n]
            for part in (key, value)
        )
        output, block = captured_attention(own_query, own_key, own_value, scale, capture)
        capture.blocks.append(block)
        if n < row.length:
            output = mx.pad(output, [(0, 0), (0, 0), (0, row.length - n), (0, 0)])
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def captured_attention(
    query: mx.array, key: mx.array, value: mx.array, scale: float, capture: RowCapture
) -> tuple[mx.array, tuple[mx.array, mx.array, mx.array]]:
    """Causal attention whose weights are read: the output, and the layer's attention block.

    Output and block share one softmax, which costs about as much as the fused attention that it
    stands in for; reading fused attention's inputs a second time would cost that on top. Weights
    are [heads, n, c + n - 1] in float32, for the n rows of a step only.

    Args:
        query: [1, heads, n, dim].
        key: [1, kv_heads, c + n - 1, dim].
        value: as the keys.
        scale: factor on the scores.
        capture: sources, sinks and epsilon.

    Returns:
        The output [1, heads, n, dim], and ``source_mass`` [n], ``sink_mass`` [n] and ``step``
        [n, n] as `AttentionBlock` has them, in float32.
    """
    _, heads, n, dim = query.shape
    _, kv_heads, width, _ = key.shape
    grouped = (query.astype(mx.float32) * scale).reshape(kv_heads, -1, dim)
    scores = (grouped @ key[0].astype(mx.float32).swapaxes(1, 2)).reshape(heads, n, width)
    # Only the step's own columns can lie in a row's future.
    future = mx.arange(n) > mx.arange(n)[:, None]
    scores[..., width - n :] = mx.where(future, -mx.inf, scores[..., width - n :])
    weights = mx.softmax(scores, axis=-1)
    output = weights.reshape(kv_heads, -1, width) @ value[0].astype(mx.float32)
    output = output.reshape(1, heads, n, -1).astype(query.dtype)
    return output, attention_block(weights, capture)


def attention_block(weights: mx.array, capture: RowCapture) -> tuple[mx.array, mx.array, mx.array]:
    """The block of one layer from its softmax weights [heads, n, c + n - 1].

    Per head and row: drop weights below epsilon, drop sinks, renormalise; a row left empty becomes
    its own token. Then the heads are averaged.
    """
    _, n, width = weights.shape
    sink_mass = (weights @ capture.sinks)[..., 0].mean(0)
    weights = _drop_below(weights, mx.array(capture.epsilon))
    source_mass = (weights @ capture.sources)[..., 0]  # [heads, n]
    # Position c-1 is the step's first column and the context's last: counted there if a source,
    # dropped if a sink.
    step = mx.where(mx.arange(n) == 0, 0.0, weights[..., width - n :])  # [heads, n, n]
    total = source_mass + step.sum(-1)
    is_empty = total == 0
    total = mx.where(is_empty, 1.0, total)
    source_mass, step = source_mass / total, step / total[..., None]
    itself = mx.eye(n)
    if capture.is_last_source:
        is_first = mx.arange(n) == 0
        source_mass = mx.where(is_empty & is_first, 1.0, source_mass)
        itself = mx.where(is_first, 0.0, itself)
    step = step + itself * is_empty[..., None]
    return source_mass.mean(0), sink_mass, step.mean(0)


@partial(mx.compile, shapeless=True)
def _drop_below(weights: mx.array, epsilon: mx.array) -> mx.array:
    return mx.where(weights < epsilon, 0.0, weights)


def _fold(states: mx.array, row: Row, first: int) -> mx.array:
    """A row's part of [slots, heads, length, dim] as [1, heads, slots * length, dim]."""
    if states.shape[0] > row.num_slots:
        states = states[first : first + row.num_slots]
    if states.shape[2] > row.length:
        states = states[:, :, : row.length]
    if row.num_slots == 1:
        return states
    if row.length == 1:
        return states.swapaxes(0, 2)
    return states.swapaxes(0, 1).reshape(1, states.shape[1], -1, states.shape[3])


def _unfold(output: mx.array, row: Row, width: int) -> mx.array:
    """The way back, padded to ``width`` tokens a slot."""
    if row.num_slots > 1 and row.length == 1:
        output = output.swapaxes(0, 2)
    elif row.num_slots > 1:
        _, heads, _, dim = output.shape
        output = output.reshape(heads, row.num_slots, row.length, dim).swapaxes(0, 1)
    if row.length == width:
        return output
    return mx.pad(output, [(0, 0), (0, 0), (0, width - row.length), (0, 0)])


def _refusal(reason: str) -> SpecguardError:
    return SpecguardError(
        f"the model {reason}, which this backend cannot express",
        "choose a model with plain attention in every layer",
    )

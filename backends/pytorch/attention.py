"""Attention of one pass, row by row: SDPA for the output and, while capturing, a step's blocks.

Registered with transformers under a name of its own. The pass travels to it as a keyword argument
of the model's forward, so nothing is patched and no state is global.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from specguard.backends.local.layer import Row, RowCapture
from specguard.backends.pytorch.kv import KVBuffer
from specguard.core.engine import AttentionBlock
from specguard.core.errors import SpecguardError

ATTENTION_NAME = "specguard"
_MANY_QUERIES = 256  # of a head; a mask for each head of a group would be large
# What some models ask of their attention besides a mask and a scale.
_UNSUPPORTED = ("softcap", "s_aux", "sliding_window", "position_bias")


@dataclass(slots=True)
class PlacedRow:
    """A row, the pass's queries that are its own, and what these see.

    ``mask`` [1, 1, queries, columns] is 0 where a query may look and minus infinity elsewhere; None
    means everywhere, or, from an empty cache, causally.
    """

    row: Row
    buffer: KVBuffer
    queries: slice
    mask: Tensor | None
    captures: list["DeviceCapture"]
    _repeated: dict[int, Tensor] = field(default_factory=dict)

    @property
    def is_causal(self) -> bool:
        """Whether fused attention can be told so, instead of a large mask."""
        return self.row.start == 0 and self.row.visible is None and self.row.num_queries > 1

    def mask_of(self, groups: int) -> Tensor | None:
        """The mask for the queries of so many heads one after the other."""
        if self.mask is None or groups == 1:
            return self.mask
        if groups not in self._repeated:
            self._repeated[groups] = self.mask.repeat(1, 1, groups, 1)
        return self._repeated[groups]


@dataclass(slots=True)
class DeviceCapture:
    """A row's capture on the device: it begins at ``first_layer``.

    ``queries`` and ``columns`` index the row's queries and the buffer's columns; ``source`` and
    ``sink`` [c] are 1.0 where a context token is one.
    """

    wanted: RowCapture
    queries: Tensor | slice
    columns: Tensor | slice
    source: Tensor
    sink: Tensor
    first_layer: int
    layers: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def finish(self) -> None:
        """Hand the blocks over."""
        # In one copy: each waits for a GPU.
        parts = [part.flatten() for layer in self.layers for part in layer]
        n = len(self.layers[0][0])
        for block in torch.cat(parts).cpu().numpy().reshape(len(self.layers), n * (n + 2)):
            source_mass, sink_mass, step = np.split(block, [n, 2 * n])
            self.wanted.blocks.append(AttentionBlock(source_mass, sink_mass, step.reshape(n, n)))


@dataclass(slots=True)
class AttentionPass:
    """One forward pass, and how many layers have used it."""

    rows: Sequence[PlacedRow]
    num_layers_seen: int = 0


def register() -> None:
    """Make the attention known to transformers; more than once does no harm."""
    AttentionInterface.register(ATTENTION_NAME, attend)
    # Without a mask function of the same name, transformers passes no mask to a cached pass.
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    attention_pass: AttentionPass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention output [1, N, heads, dim]; query [1, heads, N, dim], key [1, kv_heads, N, dim]."""
    if attention_pass is None:
        output, weights = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return output, weights
    for option in _UNSUPPORTED:
        if kwargs.get(option) is not None:
            raise SpecguardError(
                f"{type(module).__name__} uses attention with {option!r}, which is not supported",
                "choose a model with plain attention in every layer",
            )
    attention_pass.num_layers_seen += 1
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = [
        attend_row(
            layer,
            query[0, :, placed.queries],
            key[0, :, placed.queries],
            value[0, :, placed.queries],
            scale,
            placed,
        )
        for placed in attention_pass.rows
    ]
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output.unsqueeze(0), None


def attend_row(
    layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, placed: PlacedRow
) -> Tensor:
    """One row's output [q, heads, dim]; its new keys and values go to its buffer.

    query [heads, q, dim], key and value [kv_heads, q, dim].
    """
    heads, length, dim = query.shape
    kv_heads = key.shape[0]
    keys, values = placed.buffer.write(layer, placed.row.start, key, value)
    groups = heads // kv_heads
    if length > _MANY_QUERIES or placed.is_causal:
        if placed.mask is not None and keys.device.type == "cuda":
            # No fused kernel of CUDA takes a mask and heads that share their keys.
            keys, values = (part.repeat_interleave(groups, 1) for part in (keys, values))
            kv_heads, groups = heads, 1
        output = scaled_dot_product_attention(
            query.unsqueeze(0),
            keys,
            values,
            attn_mask=placed.mask,
            is_causal=placed.is_causal,
            scale=scale,
            enable_gqa=groups > 1,
        )[0]
    else:
        # The heads of a group become further queries of their key head: no copy of the keys.
        output = scaled_dot_product_attention(
            query.reshape(1, kv_heads, groups * length, dim),
            keys,
            values,
            attn_mask=placed.mask_of(groups),
            scale=scale,
        ).view(heads, length, value.shape[-1])
    for capture in placed.captures:
        if layer >= capture.first_layer:
            capture.layers.append(attention_block(query, keys[0], scale, capture))
    return output.transpose(0, 1).contiguous()


def attention_block(
    query: Tensor, key: Tensor, scale: float, capture: DeviceCapture
) -> tuple[Tensor, Tensor, Tensor]:
    """``source_mass`` [n], ``sink_mass`` [n] and ``step`` [n, n] of one layer, in float32.

    Per head and row: softmax, drop weights below epsilon, drop sinks, renormalise; a row left empty
    becomes its own token. Then the heads are averaged.

    Args:
        query: [heads, q, dim] of the whole row.
        key: [kv_heads, columns, dim].
        scale: factor on the scores.
        capture: the step's queries, columns and sources.
    """
    keys = key[:, capture.columns].float()  # [kv_heads, c + n - 1, dim]
    kv_heads, width, dim = keys.shape
    context = len(capture.source)
    n = width - context + 1
    grouped = query[:, capture.queries].float().reshape(kv_heads, -1, dim)  # [., groups * n, .]
    scores = torch.matmul(grouped * scale, keys.transpose(1, 2)).view(-1, n, width)
    # Only the step's own columns can lie in a row's future.
    future = torch.ones(n, n, dtype=torch.bool, device=query.device).triu_(1)
    scores[:, :, context - 1 :].masked_fill_(future, float("-inf"))
    weights = scores.softmax(-1)  # [heads, n, c + n - 1]

    sink_mass = (weights[:, :, :context] @ capture.sink).mean(0)
    # In place: on a long context the weights are the largest thing here. Only what is above the
    # number below epsilon stays.
    below = np.nextafter(np.float32(capture.wanted.capture.epsilon), np.float32(-1))
    weights = torch.threshold_(weights, float(below), 0.0)
    source_mass = weights[:, :, :context] @ capture.source  # [heads, n]
    step = weights[:, :, context - 1 :].clone()  # [heads, n, n]
    # Position c-1 is the step's first column and the context's last: counted there if a source,
    # dropped if a sink.
    step[:, :, 0] = 0.0
    total = source_mass + step.sum(-1)
    is_empty = total == 0
    total = torch.where(is_empty, 1.0, total)
    source_mass, step = source_mass / total, step / total.unsqueeze(-1)
    step += torch.diag_embed(is_empty.float())
    if capture.wanted.is_last_source:
        source_mass[:, 0] += step[:, 0, 0]
        step[:, 0, 0] = 0.0
    return source_mass.mean(0), sink_mass, step.mean(0)

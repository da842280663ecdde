"""Attention for one pass: SDPA for the output and, while capturing, a step's attention blocks.

Registered with transformers under a name of its own. The pass travels to it as a keyword argument
of the model's forward, so nothing is patched and no state is global.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from specguard.core.errors import SpecguardError

ATTENTION_NAME = "specguard"
# What some models ask of their attention besides a mask and a scale.
_UNSUPPORTED = ("softcap", "s_aux", "sliding_window", "position_bias")


@dataclass(slots=True)
class RowCapture:
    """What to read of one batch row: the n rows of a step against the step's own columns.

    ``queries`` [n] are the step's places in the pass, ``columns`` [c + n - 1] the buffer columns of
    positions 0 .. c+n-2; ``is_source`` [c]. Layers are read from ``first_layer`` on; ``blocks``
    collects (source_mass, sink_mass, step) layer by layer.
    """

    row: int
    queries: Tensor | slice
    columns: Tensor | slice
    is_source: Tensor
    epsilon: float
    first_layer: int
    blocks: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)


@dataclass(slots=True)
class AttentionPass:
    """One forward pass: who sees what, and what is captured.

    ``mask`` [B, 1, q, columns] is 0 where a query may look and minus infinity elsewhere; None means
    everywhere, or causally from an empty cache.
    """

    mask: Tensor | None = None
    is_causal: bool = False
    captures: list[RowCapture] = field(default_factory=list)
    num_layers_seen: int = 0
    _repeated: dict[int, Tensor] = field(default_factory=dict)

    def mask_of(self, groups: int) -> Tensor | None:
        """The mask for the queries of so many heads one after the other."""
        if self.mask is None or groups == 1:
            return self.mask
        if groups not in self._repeated:
            self._repeated[groups] = self.mask.repeat(1, 1, groups, 1)
        return self._repeated[groups]


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
    """Attention output [B, q, heads, dim]; query [B, heads, q, dim], key [B, kv_heads, T, dim]."""
    if attention_pass is None:
        output, weights = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return output, weights
    attention_pass.num_layers_seen += 1
    for option in _UNSUPPORTED:
        if kwargs.get(option) is not None:
            raise SpecguardError(
                f"{type(module).__name__} uses attention with {option!r}, which is not supported",
                "choose a model with plain attention in every layer",
            )
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    if attention_pass.is_causal:
        output = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1
        )
    else:
        # The heads of a group become further queries of their key head: no copy of the keys.
        output = scaled_dot_product_attention(
            query.reshape(batch, kv_heads, groups * length, dim),
            key,
            value,
            attn_mask=attention_pass.mask_of(groups),
            scale=scaling,
        ).view(batch, heads, length, value.shape[-1])
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = dim**-0.5 if scaling is None else scaling
    for capture in attention_pass.captures:
        if layer >= capture.first_layer:
            block = attention_block(query[capture.row], key[capture.row], scale, capture)
            capture.blocks.append(block)
    return output.transpose(1, 2).contiguous(), None


def attention_block(
    query: Tensor, key: Tensor, scale: float, capture: RowCapture
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
    context = len(capture.is_source)
    n = width - context + 1
    grouped = query[:, capture.queries].float().reshape(kv_heads, -1, dim)  # [., groups * n, .]
    scores = torch.matmul(grouped * scale, keys.transpose(1, 2)).view(-1, n, width)
    # Only the step's own columns can lie in a row's future.
    future = torch.ones(n, n, dtype=torch.bool, device=query.device).triu_(1)
    scores[:, :, context - 1 :].masked_fill_(future, float("-inf"))
    weights = scores.softmax(-1)  # [heads, n, c + n - 1]

    source, sink = capture.is_source, ~capture.is_source
    sink_mass = (weights[:, :, :context] @ sink.float()).mean(0)
    # In place: on a long context the weights are the largest thing here. Only what is above the
    # number below epsilon stays.
    below = np.nextafter(np.float32(capture.epsilon), np.float32(-1))
    weights = torch.threshold_(weights, float(below), 0.0)
    source_mass = weights[:, :, :context] @ source.float()  # [heads, n]
    step = weights[:, :, context - 1 :].clone()  # [heads, n, n]
    # Position c-1 is the step's first column and the context's last: counted there if a source,
    # dropped if a sink.
    step[:, :, 0] = 0.0
    total = source_mass + step.sum(-1)
    is_empty = total == 0
    total = torch.where(is_empty, 1.0, total)
    source_mass, step = source_mass / total, step / total.unsqueeze(-1)
    step += torch.diag_embed(is_empty.float())
    if bool(source[-1]):
        source_mass[:, 0] += step[:, 0, 0]
        step[:, 0, 0] = 0.0
    return source_mass.mean(0), sink_mass, step.mean(0)

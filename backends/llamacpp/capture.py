"""Attention blocks from softmax weights that llama.cpp has computed."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from specguard.backends.local.layer import RowCapture
from specguard.core.engine import AttentionBlock


def attention_block(weights: NDArray[np.floating[Any]], wanted: RowCapture) -> AttentionBlock:
    """One layer's block from its weights [heads, n, c + n - 1] in the rows that predict a step.

    Per head and row: drop weights below epsilon, drop sinks, renormalise; a row left empty becomes
    its own token. Then the heads are averaged.
    """
    _, n, width = weights.shape
    is_source = wanted.capture.is_source
    context = len(is_source)
    sink_mass = weights[..., :context][..., ~is_source].sum(-1).mean(0)
    kept = np.where(weights < wanted.capture.epsilon, 0, weights)
    source_mass = kept[..., :context][..., is_source].sum(-1)
    step = kept[..., width - n :].copy()
    # Position c-1 is the step's first column and the context's last: counted there if a source,
    # dropped if a sink.
    step[..., 0] = 0
    total = source_mass + step.sum(-1)
    is_empty = total == 0
    divisor = np.where(is_empty, 1, total)
    source_mass, step = source_mass / divisor, step / divisor[..., None]
    itself = np.eye(n, dtype=weights.dtype)
    if wanted.is_last_source:
        source_mass[:, 0] += is_empty[:, 0]
        itself[0, 0] = 0
    step += itself * is_empty[..., None]
    return AttentionBlock(source_mass.mean(0), sink_mass, step.mean(0))

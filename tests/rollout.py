"""The full T x T attention rollout, as a reference for what blocks must give."""

import numpy as np

from specguard.core.engine import AttentionBlock, BoolArray, FloatArray


def clean(weights: FloatArray, is_sink: BoolArray, epsilon: float) -> FloatArray:
    """Head-averaged [T, T]: drop below epsilon and sinks, renormalise, empty rows to themselves."""
    kept = np.where((weights < epsilon) | is_sink, 0.0, weights)
    total = kept.sum(-1, keepdims=True)
    kept = np.where(total > 0, kept / np.where(total > 0, total, 1.0), np.eye(weights.shape[-1]))
    return kept.mean(0)


def full_rollout(
    layers: list[FloatArray], is_source: BoolArray, n: int, epsilon: float, residual: float
) -> FloatArray:
    """Mass on the sources [n] for the rows c-1 .. c+n-2; layers are softmax weights [H, T, T]."""
    width = layers[0].shape[-1]
    context = len(is_source)
    assert width == context + n - 1
    is_sink = np.zeros(width, dtype=bool)
    is_sink[:context] = ~is_source
    rolled = np.eye(width)
    for weights in layers:
        mixed = (1 - residual) * clean(weights, is_sink, epsilon) + residual * np.eye(width)
        rolled = mixed @ rolled
    columns = np.zeros(width, dtype=bool)
    columns[:context] = is_source
    return rolled[context - 1 :, columns].sum(-1)


def block_of(weights: FloatArray, is_source: BoolArray, n: int, epsilon: float) -> AttentionBlock:
    """What a backend hands over for one layer of softmax weights [H, T, T]."""
    context, width = len(is_source), weights.shape[-1]
    is_sink = np.zeros(width, dtype=bool)
    is_sink[:context] = ~is_source
    cleaned = clean(weights, is_sink, epsilon)[context - 1 :]
    step = cleaned[:, context - 1 :].copy()
    if is_source[-1]:
        step[:, 0] = 0.0
    rows = weights.mean(0)[context - 1 :, :context]
    return AttentionBlock(
        source_mass=cleaned[:, :context][:, is_source].sum(-1),
        sink_mass=rows[:, ~is_source].sum(-1),
        step=step,
    )

"""Attention-based grounding: what counts as ground, and rollout over a step's attention blocks.

Knows nothing of models: a block is what `Engine.score` hands over for one layer.
"""

from collections.abc import Sequence

import numpy as np

from specguard.core.config import Sources
from specguard.core.engine import AttentionBlock, BoolArray, FloatArray, Prompt


def grounding(
    blocks: Sequence[AttentionBlock], is_first_row_source: bool, residual: float
) -> FloatArray:
    """Rollout mass on the grounding sources [n], one value per token of the step.

    A token is read from the row that predicts it. With a_l [n] = source mass and S_l [n, n] = step
    weights of layer l: g_l = (1 - r)(a_l + S_l g_{l-1}) + r g_{l-1}, which equals the rows of the
    full T x T rollout (paper, section on attention-based grounding; Abnar and Zuidema 2020).

    Args:
        blocks: from the lowest captured layer to the top one, each of n rows.
        is_first_row_source: whether position c-1, the first row's own token, is a source.
        residual: r, the share of the identity in each layer's mix.
    """
    mass = np.zeros(len(blocks[0].source_mass))
    mass[0] = is_first_row_source
    for block in blocks:
        attended = block.source_mass + block.step @ mass
        mass = (1 - residual) * attended + residual * mass
    return mass


def source_mask(prompt: Prompt, length: int, sources: Sources) -> BoolArray:
    """Which of ``length`` context tokens are grounding sources, the others being sinks.

    "context" (the paper's): all of them. "problem": the problem and the accepted steps; not the
    chat template, the system prompt and the first token, where models park their attention.
    """
    is_source = np.ones(length, dtype=np.bool_)
    if sources == "problem":
        first, last = prompt.problem_span
        is_source[: len(prompt.token_ids)] = False
        is_source[first:last] = True
        is_source[0] = False
    return is_source

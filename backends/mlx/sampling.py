"""From logits to tokens: log-probabilities, warping by temperature and top-p, inverse CDF.

What runs for every token is compiled, once for each number of rows: fewer operations to schedule.
"""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar, cast

import mlx.core as mx

from specguard.core.engine import Sampling
from specguard.core.reference import is_reference

_BLOCK = 256  # token ids
_LOWEST = -1e30
F = TypeVar("F", bound=Callable[..., object])


def _compiled(work: F) -> F:
    """`mx.compile`, which does not tell types; arguments other than arrays are constants."""
    compiled = mx.compile(work)

    @wraps(work)
    def chosen(*args: object) -> object:
        return work(*args) if is_reference() else compiled(*args)

    return cast(F, chosen)


@_compiled
def describe(logits: mx.array, token_ids: mx.array) -> tuple[mx.array, mx.array]:
    """Log-prob of a token and entropy (nats) of each row [N, V], at temperature 1, in float32."""
    logits = logits.astype(mx.float32)
    total = mx.logsumexp(logits, axis=-1)
    # A token that is ruled out by -inf adds nothing; its product would not be a number.
    mean = (mx.softmax(logits, axis=-1) * mx.maximum(logits, _LOWEST)).sum(-1)
    return entries(logits, token_ids) - total, total - mean


def entries(rows: mx.array, token_ids: mx.array) -> mx.array:
    """The entry [N] of every row [N, V] that a token stands for."""
    return mx.take_along_axis(rows, token_ids[:, None], axis=-1)[:, 0]


def warp(logits: mx.array, sampling: Sampling) -> mx.array:
    """Probabilities [N, V] after temperature and top-p; one-hot where sampling is greedy.

    Top-p keeps the fewest most probable tokens whose mass reaches it, and any that tie with the
    last of them.
    """
    if sampling.is_greedy:
        best = mx.argmax(logits, axis=-1)
        return (mx.arange(logits.shape[-1]) == best[:, None]).astype(mx.float32)
    return _warped(logits, sampling.temperature, sampling.top_p)


@_compiled
def _warped(logits: mx.array, temperature: float, top_p: float) -> mx.array:
    probs = mx.softmax(logits.astype(mx.float32) / temperature, axis=-1)
    if top_p < 1:
        ordered = mx.sort(probs, axis=-1)[:, ::-1]
        is_kept = mx.cumsum(ordered, axis=-1) - ordered < top_p
        smallest = mx.where(is_kept, ordered, 1.0).min(-1, keepdims=True)
        probs = mx.where(probs < smallest, 0.0, probs)
        probs = probs / probs.sum(-1, keepdims=True)
    return probs


@_compiled
def draw(probs: mx.array, uniforms: mx.array) -> mx.array:
    """The inverse CDF [N] of weights [N, V], in order of token ids; rows need not sum to 1.

    First the block of ids is found, then the id in it: in single precision, a running sum over a
    whole vocabulary would lose the small probabilities at its end.
    """
    blocks = mx.pad(probs, [(0, 0), (0, -probs.shape[-1] % _BLOCK)])
    blocks = blocks.reshape(len(probs), -1, _BLOCK)
    sums = blocks.sum(-1)
    before = mx.cumsum(sums, axis=-1, inclusive=False)
    block, rest = _first_above(sums, uniforms[:, None] * sums.sum(-1, keepdims=True), before)
    inside = mx.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    offset, _ = _first_above(inside, rest, mx.cumsum(inside, axis=-1, inclusive=False))
    # Only what is not a number comes out past the end; the caller refuses its log-probability.
    return mx.minimum(block * _BLOCK + offset, probs.shape[-1] - 1)


def _first_above(
    weights: mx.array, wanted: mx.array, before: mx.array
) -> tuple[mx.array, mx.array]:
    """The last entry [N] that begins at or before ``wanted`` [N, 1], and what of that is left.

    Entries without weight are passed over, so rounding never leads to what is impossible.
    """
    begins = (before <= wanted) & (weights > 0)
    places = mx.arange(weights.shape[-1])
    found = mx.where(begins, places, 0).max(-1)
    return found, wanted - entries(before, found)[:, None]

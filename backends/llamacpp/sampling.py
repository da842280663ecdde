"""From logits to tokens in NumPy, row by row: what a row needs stays in the processor's cache."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specguard.core.engine import FloatArray, Sampling

_LOWEST = np.float32(-1e4)  # a log-probability whose probability is 0

Logits = NDArray[np.float32]
TokenIds = NDArray[np.int64]


class Scratch:
    """Memory for a row, kept from call to call: to take it anew costs more than to fill it."""

    def __init__(self) -> None:
        self._arrays: dict[str, Logits] = {}

    def __call__(self, name: str, size: int) -> Logits:
        """An array [size] whose content is whatever it was."""
        array = self._arrays.get(name)
        if array is None or len(array) != size:
            array = self._arrays[name] = np.empty(size, dtype=np.float32)
        return array


def describe(
    logits: Logits, rows: Sequence[int], token_ids: Sequence[int] | TokenIds, scratch: Scratch
) -> tuple[FloatArray, FloatArray]:
    """Log-probs and entropies (nats) of tokens [N] at temperature 1; each of a row of logits."""
    logprobs = np.empty(len(rows), dtype=np.float32)
    entropies = np.empty(len(rows), dtype=np.float32)
    known: dict[int, tuple[Any, Any, Any]] = {}
    for place, (row, token_id) in enumerate(zip(rows, token_ids, strict=True)):
        if row not in known:
            known[row] = _sizes(logits[row], scratch)
        highest, size, entropy = known[row]
        logprobs[place] = logits[row, token_id] - highest - size
        entropies[place] = entropy
    return logprobs, entropies


def _sizes(row: Logits, scratch: Scratch) -> tuple[Any, Any, Any]:
    """The highest logit, the log of the sum of all behind it, and the entropy."""
    highest = row.max()
    below, weights = _exponentials(row, highest, None, scratch)
    total = weights.sum()
    size = np.log(total)
    return highest, size, size - np.dot(weights, below) / total


def _exponentials(
    row: Logits, highest: Any, temperature: float | None, scratch: Scratch
) -> tuple[Logits, Logits]:
    """Logits below the highest, and their exponentials, both in scratch memory."""
    below, weights = scratch("below", len(row)), scratch("weights", len(row))
    np.subtract(row, highest, out=below)
    if temperature is not None:
        np.divide(below, np.float32(temperature), out=below)
    np.maximum(below, _LOWEST, out=below)  # nothing times minus infinity is not a number
    np.exp(below, out=weights)
    return below, weights


def first_choices(logits: Logits) -> TokenIds:
    """The most probable token id [A] of each row, the first of those that tie."""
    return np.array([row.argmax() for row in logits], dtype=np.int64)


def sample(
    logits: Logits,
    owners: Sequence[int],
    sampling: Sampling,
    uniforms: FloatArray,
    scratch: Scratch,
) -> TokenIds:
    """Token ids [N]: the inverse CDF of ``uniforms`` [N], in order of token ids."""
    if sampling.is_greedy:
        return first_choices(logits)[list(owners)]
    found = np.zeros(len(owners), dtype=np.int64)
    rows = np.asarray(owners)
    for row in np.unique(rows):
        wanted = np.flatnonzero(rows == row)
        token_ids, weights = _kept(logits[row], sampling, scratch)
        if not len(weights):  # not a number: the caller refuses its log-probability
            continue
        cdf = np.cumsum(weights, dtype=np.float64)
        # Just below the total, so that rounding never reaches past the last possible token.
        values = np.minimum(uniforms[wanted] * cdf[-1], cdf[-1] * (1 - 2**-22))
        places = np.searchsorted(cdf, values, side="right")
        found[wanted] = token_ids[places]
    return found


def warp(logits: Logits, sampling: Sampling, scratch: Scratch) -> FloatArray:
    """Probabilities [A, V] after temperature and top-p; one-hot where sampling is greedy.

    Top-p keeps the fewest most probable tokens whose mass reaches it, and any that tie with the
    last of them.
    """
    probs = np.zeros(logits.shape, dtype=np.float32)
    if sampling.is_greedy:
        probs[np.arange(len(logits)), first_choices(logits)] = 1.0
        return probs
    for row, place in zip(logits, probs, strict=True):
        token_ids, weights = _kept(row, sampling, scratch)
        place[token_ids] = weights / weights.sum()
    return probs


def _kept(row: Logits, sampling: Sampling, scratch: Scratch) -> tuple[TokenIds, Logits]:
    """What top-p leaves of a row: token ids, ascending, and weights."""
    _, weights = _exponentials(row, row.max(), sampling.temperature, scratch)
    if sampling.top_p >= 1:
        return np.arange(len(row)), weights if weights[0] == weights[0] else weights[:0]
    total = weights.sum()
    # All that lie below this together have less than what top-p leaves out.
    possible = np.flatnonzero(weights >= (1 - sampling.top_p) * total / len(row))
    own = weights[possible]
    ordered = np.sort(own)[::-1]
    before = np.cumsum(ordered, dtype=np.float64) - ordered
    num_kept = int(np.count_nonzero(before < sampling.top_p * float(total)))
    is_kept = own >= ordered[:num_kept].min(initial=np.inf)
    return possible[is_kept], own[is_kept]

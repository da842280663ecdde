"""The self-consistency selector: the candidate most similar to the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from specguard.core.model import Candidate, FloatArray

# Embeddings [k, d] of k candidates, one row each; rows need no normalisation.
Embedder = Callable[[Sequence[Candidate]], FloatArray]


@dataclass(frozen=True, slots=True)
class Selection:
    """Index of the kept candidate and every candidate's mean similarity to the others."""

    index: int
    similarities: tuple[float, ...]


def select_medoid(candidates: Sequence[Candidate], embed: Embedder) -> Selection:
    """Keep the candidate with the highest mean cosine similarity to the others (paper, selector).

    Ties go to the higher minimum log-probability, then to the lower index. A single candidate is
    similar to itself (1.0) and is not embedded.
    """
    if len(candidates) == 1:
        return Selection(0, (1.0,))
    similarities = mean_similarities(embed(candidates))
    # The same tokens come out with scores that differ in the last bits, by their place in a batch:
    # the first of them speaks for all. Other texts may be equal but for rounding, too.
    first: dict[tuple[int, ...], int] = {}
    keys = []
    for index, candidate in enumerate(candidates):
        twin = first.setdefault(candidate.token_ids, index)
        logprob = float(candidates[twin].token_logprobs.min())
        keys.append((round(similarities[twin], 6), round(logprob, 6), -index))
    return Selection(max(range(len(keys)), key=keys.__getitem__), similarities)


def mean_similarities(embeddings: FloatArray) -> tuple[float, ...]:
    """Mean cosine similarity of each row [k, d] to the other rows; a zero row has similarity 0."""
    rows = np.asarray(embeddings, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    similarity = rows @ rows.T
    totals = similarity.sum(axis=1) - similarity.diagonal()
    return tuple((totals / (len(rows) - 1)).tolist())

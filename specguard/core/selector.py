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
    # Equal texts have embeddings that differ in the last bits only: that is a tie.
    keys = [
        (round(similarity, 6), round(float(candidate.token_logprobs.min()), 6), -i)
        for i, (similarity, candidate) in enumerate(zip(similarities, candidates, strict=True))
    ]
    return Selection(max(range(len(keys)), key=keys.__getitem__), similarities)


def mean_similarities(embeddings: FloatArray) -> tuple[float, ...]:
    """Mean cosine similarity of each row [k, d] to the other rows; a zero row has similarity 0."""
    rows = np.asarray(embeddings, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    similarity = rows @ rows.T
    totals = similarity.sum(axis=1) - similarity.diagonal()
    return tuple((totals / (len(rows) - 1)).tolist())

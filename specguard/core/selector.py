"""Which candidate is kept: the one most similar to the others, or the best by its verdict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from specguard.core.engine import Candidate, FloatArray
from specguard.core.verifier import Verdict

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
    keys = {
        index: (
            round(similarities[index], 6),
            round(float(candidates[index].token_logprobs.min()), 6),
            -index,
        )
        for index in distinct(candidates)
    }
    return Selection(max(keys, key=keys.__getitem__), similarities)


def distinct(candidates: Sequence[Candidate]) -> list[int]:
    """Indices of the candidates without those whose tokens an earlier one has already."""
    first: dict[tuple[int, ...], int] = {}
    for index, candidate in enumerate(candidates):
        first.setdefault(candidate.token_ids, index)
    return list(first.values())


def best_verdict(verdicts: Mapping[int, Verdict]) -> int:
    """The candidate with the highest ensemble score.

    Ties, frequent where scores are clamped, go to the higher minimum log-probability, then to the
    lower index.
    """

    def key(index: int) -> tuple[float, float, int]:
        verdict = verdicts[index]
        return round(verdict.scores["ensemble"], 6), round(verdict.signals["log_prob"], 6), -index

    return max(verdicts, key=key)


def mean_similarities(embeddings: FloatArray) -> tuple[float, ...]:
    """Mean cosine similarity of each row [k, d] to the other rows; a zero row has similarity 0."""
    rows = np.asarray(embeddings, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    similarity = rows @ rows.T
    totals = similarity.sum(axis=1) - similarity.diagonal()
    return tuple((totals / (len(rows) - 1)).tolist())

"""A `Drafting` for models that cannot take sequences in while they draw."""

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from specguard.core.model import (
    Boundary,
    Candidate,
    FloatArray,
    LanguageModel,
    Sampling,
    TokenSequence,
)

S = TypeVar("S", bound=TokenSequence)


class WholeDrafting(Generic[S]):
    """Who has joined is drawn for in one call, to the end."""

    def __init__(
        self,
        model: LanguageModel[Any],
        num_candidates: int,
        sampling: Sampling,
        keep_distributions: bool = False,
    ) -> None:
        self._model = model
        self._num_candidates, self._sampling = num_candidates, sampling
        self._keeps_distributions = keep_distributions
        self._joined: list[tuple[S, Boundary, FloatArray]] = []

    def add(self, sequence: S, boundary: Boundary, uniforms: FloatArray) -> None:
        """A sequence joins."""
        self._joined.append((sequence, boundary, uniforms))

    def run(self, num_wanted: int) -> list[tuple[S, list[Candidate]]]:
        """Draw for all."""
        if not self._joined:
            return []
        sequences, boundaries, uniforms = zip(*self._joined, strict=True)
        self._joined.clear()
        candidates = self._model.propose(
            sequences,
            self._num_candidates,
            self._sampling,
            boundaries,
            side_by_side(uniforms),
            self._keeps_distributions,
        )
        return list(zip(sequences, candidates, strict=True))


def side_by_side(uniforms: Sequence[FloatArray]) -> FloatArray:
    """Uniforms [..., n] in one array, the shorter ones filled up with zeros."""
    width = max(part.shape[-1] for part in uniforms)
    grid = np.zeros((len(uniforms), *uniforms[0].shape[:-1], width), dtype=uniforms[0].dtype)
    for row, part in zip(grid, uniforms, strict=True):
        row[..., : part.shape[-1]] = part
    return grid

"""A `Drafting` for models that cannot take sequences in while they draw."""

from typing import Any, Generic, TypeVar

from specguard.core.model import (
    Boundary,
    Candidate,
    FloatArray,
    LanguageModel,
    Sampling,
    TokenSequence,
)
from specguard.core.randomness import side_by_side

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

"""Language models around another one: `Delegate` hands every verb on, `Metered` times them too."""

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from specguard.core.drafting import WholeDrafting
from specguard.core.model import (
    Acceptance,
    Boundary,
    Candidate,
    Capture,
    Drafting,
    FloatArray,
    LanguageModel,
    Observation,
    Prompt,
    Sampling,
    Tokenizer,
    TokenSequence,
)

R = TypeVar("R")
Clock = Callable[[], float]  # seconds from some moment on


class Delegate:
    """A `LanguageModel` that does what another does; a subclass changes some of it."""

    def __init__(self, model: LanguageModel[Any]) -> None:
        self.model = model

    @property
    def name(self) -> str:
        """The other model's."""
        return self.model.name

    @property
    def tokenizer(self) -> Tokenizer:
        """The other model's."""
        return self.model.tokenizer

    @property
    def context_limit(self) -> int:
        """The other model's."""
        return self.model.context_limit

    @property
    def capture_refusal(self) -> str | None:
        """The other model's."""
        return self.model.capture_refusal

    @property
    def num_bytes_per_token(self) -> int:
        """The other model's."""
        return self.model.num_bytes_per_token

    def call(self, verb: Callable[..., R], *arguments: Any) -> R:
        """Every verb comes through here."""
        return verb(*arguments)

    def start(self, prompt: Prompt, prefix: TokenSequence | None = None) -> TokenSequence:
        """Read a prompt."""
        sequence: TokenSequence = self.call(self.model.start, prompt, prefix)
        return sequence

    def propose(
        self,
        sequences: Sequence[TokenSequence],
        num_candidates: int,
        sampling: Sampling,
        boundaries: Sequence[Boundary],
        uniforms: FloatArray,
        keep_distributions: bool = False,
    ) -> list[list[Candidate]]:
        """Sample steps."""
        return self.call(
            self.model.propose,
            sequences,
            num_candidates,
            sampling,
            boundaries,
            uniforms,
            keep_distributions,
        )

    def drafting(
        self, num_candidates: int, sampling: Sampling, keep_distributions: bool = False
    ) -> Drafting[Any]:
        """Sample steps by ``propose``."""
        return WholeDrafting(self, num_candidates, sampling, keep_distributions)

    def commit(self, sequences: Sequence[TokenSequence], candidates: Sequence[Candidate]) -> None:
        """Keep candidates."""
        self.call(self.model.commit, sequences, candidates)

    def extend(
        self,
        sequences: Sequence[TokenSequence],
        continuations: Sequence[Sequence[int]],
        captures: Sequence[Capture | None] | None = None,
        hidden_state: bool = False,
    ) -> list[Observation]:
        """Append given tokens."""
        return self.call(self.model.extend, sequences, continuations, captures, hidden_state)

    def score(
        self,
        sequences: Sequence[TokenSequence],
        continuations: Sequence[Sequence[Sequence[int]]],
        captures: Sequence[Capture | None] | None = None,
    ) -> list[list[Observation]]:
        """Observe several continuations."""
        return self.call(self.model.score, sequences, continuations, captures)

    def accept(
        self,
        sequences: Sequence[TokenSequence],
        candidates: Sequence[Candidate],
        sampling: Sampling,
        uniforms: FloatArray,
    ) -> list[Acceptance]:
        """Token-level speculative sampling."""
        return self.call(self.model.accept, sequences, candidates, sampling, uniforms)

    def rewind(self, sequence: TokenSequence, length: int) -> None:
        """Cut a sequence back."""
        self.call(self.model.rewind, sequence, length)


class Metered(Delegate):
    """Adds up seconds by verb, and keeps the longest candidate of every proposal, in tokens."""

    def __init__(self, model: LanguageModel[Any], clock: Clock = time.perf_counter) -> None:
        super().__init__(model)
        self._clock = clock
        self.seconds: dict[str, float] = {}
        self.longest: list[int] = []

    def reset(self) -> None:
        """Begin anew."""
        self.seconds, self.longest = {}, []

    def call(self, verb: Callable[..., R], *arguments: Any) -> R:
        """Time one verb."""
        started = self._clock()
        found = verb(*arguments)
        name = getattr(verb, "__name__", "")
        self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - started
        return found

    def propose(
        self,
        sequences: Sequence[TokenSequence],
        num_candidates: int,
        sampling: Sampling,
        boundaries: Sequence[Boundary],
        uniforms: FloatArray,
        keep_distributions: bool = False,
    ) -> list[list[Candidate]]:
        """Sample steps."""
        found = super().propose(
            sequences, num_candidates, sampling, boundaries, uniforms, keep_distributions
        )
        self.longest += [max(len(one.token_ids) for one in candidates) for candidates in found]
        return found

"""What a problem asks of a model, as values: so that many problems' requests can go in one call.

A solution is a generator that yields requests and is sent their results. Requests of one ``kind``
differ in their sequences only. Who performs them decides how many go together.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

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
    TokenSequence,
)
from specguard.core.randomness import side_by_side

T = TypeVar("T")


@dataclass(slots=True, eq=False, kw_only=True)
class Request(ABC):
    """``seconds`` is its share of the calls that it went with, there once it is performed."""

    model: LanguageModel[Any]
    seconds: float = field(default=0.0, init=False)

    @property
    def kind(self) -> Hashable:
        """Requests that may go in one call have equal kinds."""
        return type(self), id(self.model)

    @staticmethod
    @abstractmethod
    def perform(requests: Sequence[Any]) -> Sequence[Any]:
        """The results of requests of one kind."""


Work = Generator[Request, Any, T]  # yields requests, is sent their results, returns a T


@dataclass(slots=True, eq=False, kw_only=True)
class Start(Request):
    """Read a prompt; ``prefix`` holds its first tokens where they were read before."""

    prompt: Prompt
    prefix: TokenSequence | None = None

    @staticmethod
    def perform(requests: Sequence["Start"]) -> list[TokenSequence]:
        """One call each: prompts are long enough to fill a pass."""
        return [request.model.start(request.prompt, request.prefix) for request in requests]


@dataclass(slots=True, eq=False, kw_only=True)
class Propose(Request):
    """Sample steps; ``uniforms`` [num_candidates, boundary.max_tokens]."""

    sequence: TokenSequence
    num_candidates: int
    sampling: Sampling
    boundary: Boundary
    uniforms: FloatArray
    keep_distributions: bool = False

    @property
    def kind(self) -> Hashable:
        """Candidates are counted and drawn alike."""
        return (
            Propose,
            id(self.model),
            self.num_candidates,
            self.sampling,
            self.keep_distributions,
        )

    def drafting(self) -> Drafting[Any]:
        """Where requests of this kind may join while others are under way."""
        return self.model.drafting(self.num_candidates, self.sampling, self.keep_distributions)

    @staticmethod
    def perform(requests: Sequence["Propose"]) -> list[list[Candidate]]:
        """All sequences side by side."""
        first = requests[0]
        return first.model.propose(
            [request.sequence for request in requests],
            first.num_candidates,
            first.sampling,
            [request.boundary for request in requests],
            side_by_side([request.uniforms for request in requests]),
            first.keep_distributions,
        )


@dataclass(slots=True, eq=False, kw_only=True)
class Extend(Request):
    """Append given tokens and observe them."""

    sequence: TokenSequence
    token_ids: Sequence[int]
    capture: Capture | None = None

    @staticmethod
    def perform(requests: Sequence["Extend"]) -> list[Observation]:
        """All continuations in one pass."""
        return requests[0].model.extend(
            [request.sequence for request in requests],
            [request.token_ids for request in requests],
            [request.capture for request in requests],
        )


@dataclass(slots=True, eq=False, kw_only=True)
class Score(Request):
    """Observe several continuations side by side and keep none."""

    sequence: TokenSequence
    continuations: Sequence[Sequence[int]]
    capture: Capture | None = None

    @staticmethod
    def perform(requests: Sequence["Score"]) -> list[list[Observation]]:
        """All continuations of all sequences in one pass."""
        return requests[0].model.score(
            [request.sequence for request in requests],
            [request.continuations for request in requests],
            [request.capture for request in requests],
        )


@dataclass(slots=True, eq=False, kw_only=True)
class Accept(Request):
    """Judge guessed tokens; ``uniforms`` [n + 1] for n of them."""

    sequence: TokenSequence
    candidate: Candidate
    sampling: Sampling
    uniforms: FloatArray

    @property
    def kind(self) -> Hashable:
        """Tokens are drawn alike."""
        return Accept, id(self.model), self.sampling

    @staticmethod
    def perform(requests: Sequence["Accept"]) -> list[Acceptance]:
        """All guesses in one pass."""
        return requests[0].model.accept(
            [request.sequence for request in requests],
            [request.candidate for request in requests],
            requests[0].sampling,
            side_by_side([request.uniforms for request in requests]),
        )


def done(work: Work[T]) -> T:
    """The result of work whose requests are performed as they come."""
    result = None
    while True:
        try:
            request = work.send(result)
        except StopIteration as stop:
            found: T = stop.value
            return found
        [result] = perform([request])


def perform(requests: Sequence[Request]) -> Sequence[Any]:
    """Perform requests of one kind in one call, and share its time among them."""
    with shared_time(requests):
        return requests[0].perform(requests)


@contextmanager
def shared_time(requests: Sequence[Request]) -> Iterator[None]:
    """What goes on inside takes its time for all of these requests alike."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds = (time.perf_counter() - started) / len(requests)
        for request in requests:
            request.seconds += seconds

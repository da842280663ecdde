"""An engine around another one that times its verbs."""

import time
from collections.abc import Awaitable, Hashable
from typing import TypeVar

from specguard.core import (
    Candidate,
    Engine,
    GenerateJob,
    Observation,
    ScoreJob,
)
from specguard.costs.side import Clock

R = TypeVar("R")


class Metered:
    """Adds up seconds by verb, and keeps the longest candidate of every draw, in tokens.

    For one problem at a time: what others wait for would count twice.
    """

    def __init__(self, engine: Engine, clock: Clock = time.perf_counter) -> None:
        self.engine = engine
        self.name, self.tokenizer = engine.name, engine.tokenizer
        self.context_limit = engine.context_limit
        self.features, self.reasons = engine.features, engine.reasons
        self.num_bytes_per_token = engine.num_bytes_per_token
        self._clock = clock
        self.seconds: dict[str, float] = {}
        self.longest: list[int] = []

    def reset(self) -> None:
        """Begin anew."""
        self.seconds, self.longest = {}, []

    async def generate(self, job: GenerateJob) -> list[Candidate]:
        """Sample steps."""
        candidates = await self._timed("generate", self.engine.generate(job))
        self.longest.append(max(len(candidate.token_ids) for candidate in candidates))
        return candidates

    async def score(self, job: ScoreJob) -> list[Observation]:
        """Observe continuations."""
        return await self._timed("score", self.engine.score(job))

    def release(self, key: Hashable) -> None:
        """A problem is over."""
        self.engine.release(key)

    async def _timed(self, verb: str, work: Awaitable[R]) -> R:
        started = self._clock()
        result = await work
        self.seconds[verb] = self.seconds.get(verb, 0.0) + self._clock() - started
        return result

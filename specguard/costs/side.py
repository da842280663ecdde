"""One engine behind a text that grows, for jobs whose time is what matters.

Knows the seam and nothing of what is measured, nor of the step loop.
"""

from collections.abc import Callable, Sequence

import numpy as np

from specguard.core.config import SolveConfig
from specguard.core.engine import (
    Boundary,
    Candidate,
    Capture,
    Engine,
    GenerateJob,
    Prompt,
    Sampling,
    ScoreJob,
)
from specguard.core.grounding import source_mask

Clock = Callable[[], float]  # seconds from some moment on


class Side:
    """An engine, and in ``token_ids`` the text that its jobs stand behind.

    All jobs are of one problem, until it is released.
    """

    def __init__(self, engine: Engine, prompt: Prompt) -> None:
        self.engine, self.prompt = engine, prompt
        self.token_ids = prompt.token_ids

    @property
    def room(self) -> int:
        """Tokens that there is room for."""
        return self.engine.context_limit - len(self.token_ids)

    async def generate(self, count: int, sampling: Sampling, boundary: Boundary) -> list[Candidate]:
        """Candidates behind the text."""
        seed = len(self.token_ids)
        shape = count, boundary.max_tokens
        draws = np.random.default_rng(seed).random(shape, dtype=np.float32)
        job = GenerateJob(
            key=self,
            prefix=self.token_ids,
            sampling=sampling,
            boundary=boundary,
            num_candidates=count,
            seed=seed,
            uniforms=draws,
            hidden_states=count > 1 and "hidden states" in self.engine.features,
        )
        return await self.engine.generate(job)

    async def write(self, count: int, sampling: Sampling, num_tokens: int) -> list[Candidate]:
        """Candidates of so many tokens, whatever they say."""
        return await self.generate(count, sampling, Boundary("", frozenset(), num_tokens))

    async def score(
        self, continuations: Sequence[tuple[int, ...]], capture: Capture | None = None
    ) -> None:
        """A pass over continuations of the text."""
        job = ScoreJob(
            key=self,
            prefix=self.token_ids,
            continuations=tuple(continuations),
            capture=capture,
        )
        await self.engine.score(job)

    def capture(self, config: SolveConfig) -> Capture:
        """What a verifier reads of the attention."""
        verifier = config.verifier
        is_source = source_mask(self.prompt, len(self.token_ids), verifier.sources)
        return Capture(is_source, verifier.num_layers, verifier.epsilon)

    def release(self) -> None:
        """The problem is over."""
        self.engine.release(self)

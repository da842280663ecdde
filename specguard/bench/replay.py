"""Replay: the real step loop over real passes, with given step lengths and given decisions.

Random weights agree on nothing and say nothing that ends a step. `Replayed` stands between the loop
and such a model: every pass is computed; how long a step is, whether it is accepted and which words
it seems to consist of comes from a schedule. Where a solution stands is read from the length of the
sequence, so nothing is kept between calls.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from specguard.bench.delegate import Delegate
from specguard.core.config import Author
from specguard.core.errors import UsageError
from specguard.core.model import (
    Acceptance,
    Boundary,
    Candidate,
    Capture,
    FloatArray,
    LanguageModel,
    Observation,
    Prompt,
    Sampling,
    TokenSequence,
)

_REFUSED = -1e6  # a log-probability that scores 0 with any bounds
_NEVER = 1e9  # a uniform that rejects whatever the distributions are


@dataclass(frozen=True)
class Schedule:
    """Lengths of the steps in tokens, which of them the verifier accepts, and a seed.

    ``acceptance`` is the share of single tokens that token-level speculation accepts.
    """

    lengths: tuple[int, ...]
    accepted: tuple[bool, ...]
    acceptance: float
    seed: int = 0

    @classmethod
    def of(cls, num_steps: int, length: int, acceptance: float, seed: int = 0) -> "Schedule":
        """Steps of ``length`` tokens in the mean, half as many to half as many more.

        The accepted ones are ``num_steps * acceptance``, rounded, at random places.

        Raises:
            UsageError: no step, no token in a step, or an acceptance outside [0, 1].
        """
        if num_steps < 1 or length < 1 or not 0 <= acceptance <= 1:
            raise UsageError(f"no schedule of {num_steps} steps, {length} tokens, {acceptance}")
        rng = np.random.default_rng(seed)
        # In pairs around the mean, so that the total is the same for every seed.
        offsets = rng.integers(-(length // 2), length // 2 + 1, size=num_steps // 2)
        both = np.concatenate([offsets, -offsets, np.zeros(num_steps % 2, dtype=np.int64)])
        lengths = tuple(max(1, length + int(offset)) for offset in rng.permutation(both))
        accepted = np.arange(num_steps) < round(num_steps * acceptance)
        return cls(lengths, tuple(map(bool, rng.permutation(accepted))), acceptance, seed)

    @property
    def num_tokens(self) -> int:
        """Tokens of all steps."""
        return sum(self.lengths)

    @cached_property
    def _stops(self) -> list[int]:
        return list(accumulate(self.lengths))

    def step_at(self, position: int) -> int:
        """The step that the token at ``position`` behind the prompt belongs to."""
        return min(bisect_right(self._stops, position), len(self.lengths) - 1)

    def is_token_accepted(self, position: int) -> bool:
        """Whether token-level speculation accepts a token there."""
        draw = np.random.default_rng([self.seed, position]).random()
        return bool(draw < self.acceptance)


class Replayed(Delegate):
    """A model as ``role`` of a pair, whose steps and decisions are those of a schedule.

    Every candidate is as long as its step, whatever its tokens are, and none ends by itself. The
    target's observations are log-probabilities of 0 in accepted steps and very low ones in others,
    whichever candidate they are of. Uniforms of token-level speculation are 0 or very high, which
    takes or refuses a token whatever the distributions are (sampling needs top-p 1). ``words`` are
    token ids that neither end nor delimit anything.
    """

    def __init__(
        self, model: LanguageModel[Any], role: Author, schedule: Schedule, words: Sequence[int]
    ) -> None:
        super().__init__(model)
        self.role, self.schedule, self.words = role, schedule, list(words)
        self._num_prompt_tokens = 0

    def start(self, prompt: Prompt, prefix: TokenSequence | None = None) -> TokenSequence:
        """Read a prompt; positions count from its end."""
        self._num_prompt_tokens = len(prompt.token_ids)
        return super().start(prompt, prefix)

    def propose(
        self,
        sequences: Sequence[TokenSequence],
        num_candidates: int,
        sampling: Sampling,
        boundaries: Sequence[Boundary],
        uniforms: FloatArray,
        keep_distributions: bool = False,
    ) -> list[list[Candidate]]:
        """Steps of the scheduled length; in token-level speculation of the asked one."""
        [sequence], [boundary] = sequences, boundaries
        position = self._position(sequence)
        cap = boundary.max_tokens
        if not keep_distributions:
            cap = min(cap, self.schedule.lengths[self.schedule.step_at(position)])
        [found] = super().propose(
            sequences,
            num_candidates,
            sampling,
            [Boundary("", frozenset(), cap)],
            uniforms[:, :, :cap],
            keep_distributions,
        )
        if keep_distributions:
            return [found]
        return [[self._spoken(one, position, number) for number, one in enumerate(found)]]

    def extend(
        self,
        sequences: Sequence[TokenSequence],
        continuations: Sequence[Sequence[int]],
        captures: Sequence[Capture | None] | None = None,
        hidden_state: bool = False,
    ) -> list[Observation]:
        """Read tokens; the target sees what it was scheduled to see."""
        [position] = map(self._position, sequences)
        found = super().extend(sequences, continuations, captures, hidden_state)
        return [self._judged(one, position) for one in found]

    def score(
        self,
        sequences: Sequence[TokenSequence],
        continuations: Sequence[Sequence[Sequence[int]]],
        captures: Sequence[Capture | None] | None = None,
    ) -> list[list[Observation]]:
        """Likewise."""
        [position] = map(self._position, sequences)
        found = super().score(sequences, continuations, captures)
        return [[self._judged(one, position) for one in observations] for observations in found]

    def accept(
        self,
        sequences: Sequence[TokenSequence],
        candidates: Sequence[Candidate],
        sampling: Sampling,
        uniforms: FloatArray,
    ) -> list[Acceptance]:
        """Judge tokens by uniforms that leave no choice."""
        [position] = map(self._position, sequences)
        draws = np.array(uniforms)
        for place in range(draws.shape[1] - 1):
            is_accepted = self.schedule.is_token_accepted(position + place)
            draws[0, place] = 0.0 if is_accepted else _NEVER
        found = super().accept(sequences, candidates, sampling, draws)
        return [
            replace(one, token_ids=self._words(position, 0, len(one.token_ids))) for one in found
        ]

    def _position(self, sequence: TokenSequence) -> int:
        return len(sequence.token_ids) - self._num_prompt_tokens

    def _words(self, position: int, number: int, count: int) -> tuple[int, ...]:
        rng = np.random.default_rng([self.schedule.seed, position, number])
        return tuple(rng.choice(self.words, size=count).tolist())

    def _spoken(self, candidate: Candidate, position: int, number: int) -> Candidate:
        token_ids = self._words(position, number, len(candidate.token_ids))
        text = self.tokenizer.decode(token_ids)
        return replace(candidate, token_ids=token_ids, text=text, finish="delimiter")

    def _judged(self, seen: Observation, position: int) -> Observation:
        if self.role != "target":
            return seen
        is_accepted = self.schedule.accepted[self.schedule.step_at(position)]
        logprobs = np.full_like(seen.token_logprobs, 0.0 if is_accepted else _REFUSED)
        return replace(seen, token_logprobs=logprobs)


def plain_words(model: LanguageModel[Any]) -> list[int]:
    """Ids of tokens that are letters and spaces, at least one letter, and nothing else."""
    tokenizer = model.tokenizer
    return [
        token_id
        for token_id in sorted(tokenizer.vocabulary.values())
        if token_id not in tokenizer.eos_ids and tokenizer.decode([token_id]).strip().isalpha()
    ]

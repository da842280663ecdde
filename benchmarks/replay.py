"""Replay: the real step loop over real passes, with given step lengths and given decisions.

Random weights agree on nothing and say nothing that ends a step. `Replayed` stands between the loop
and such an engine: every pass is computed; how long a step is and whether it is accepted comes from
a schedule.
"""

from bisect import bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, count

import numpy as np

from specguard.core import (
    Boundary,
    Candidate,
    Engine,
    GenerateJob,
    Observation,
    Prompt,
    ScoreJob,
    SolveConfig,
    Solver,
    Tokenizer,
    UsageError,
    VerifierConfig,
)
from specguard.core.engine import FloatArray

_REFUSED = -1e6  # a log-probability that scores 0 with any bounds


@dataclass(frozen=True)
class Schedule:
    """Lengths of the steps in tokens, and which of them the verifier accepts.

    ``accepted_tokens`` says the same of every single token, for token-level speculation.
    """

    lengths: tuple[int, ...]
    accepted: tuple[bool, ...]
    accepted_tokens: tuple[bool, ...]

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
        offsets = rng.integers(-(length // 2), (length - 1) // 2 + 1, size=num_steps // 2)
        both = np.concatenate([offsets, -offsets, np.zeros(num_steps % 2, dtype=np.int64)])
        accepted = np.arange(num_steps) < round(num_steps * acceptance)
        return cls(
            tuple((length + rng.permutation(both)).tolist()),
            tuple(rng.permutation(accepted).tolist()),
            tuple((rng.random(num_steps * length) < acceptance).tolist()),
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all steps."""
        return self.stops[-1]

    @cached_property
    def stops(self) -> list[int]:
        """Where behind the prompt each step ends."""
        return list(accumulate(self.lengths))

    def step_at(self, position: int) -> int:
        """The step that the token at ``position`` behind the prompt belongs to."""
        return min(bisect_right(self.stops, position), len(self.lengths) - 1)


class Replayed:
    """An engine whose steps and decisions are those of a schedule.

    Every candidate reaches to the end of its step, whatever its tokens are. What is scored has
    log-probabilities of 0 in accepted steps and very low ones in others, whichever candidate it
    is; distributions and choices leave no doubt whether a guessed token is accepted. ``guesses``:
    what is drafted and read are guesses ahead, not steps.
    """

    def __init__(self, engine: Engine, schedule: Schedule, guesses: bool = False) -> None:
        self._engine, self._schedule, self._guesses = engine, schedule, guesses
        self._prompt_lengths: dict[Hashable, int] = {}
        self.name, self.features, self.reasons = engine.name, engine.features, engine.reasons
        self.context_limit = engine.context_limit
        self.num_bytes_per_token = engine.num_bytes_per_token
        self.tokenizer = _Numbering(engine.tokenizer)

    async def generate(self, job: GenerateJob) -> list[Candidate]:
        """Steps of the scheduled length; in token-level speculation of the asked one."""
        position = self._position(job)
        cap = job.boundary.max_tokens
        if not self._guesses:
            stop = self._schedule.stops[self._schedule.step_at(position)]
            cap = min(cap, stop - position)
        uniforms = None if job.uniforms is None else job.uniforms[:, :cap]
        boundary = Boundary("", frozenset(), cap)
        candidates = await self._engine.generate(replace(job, boundary=boundary, uniforms=uniforms))
        if self._guesses:
            return candidates
        return [replace(candidate, finish="delimiter") for candidate in candidates]

    async def score(self, job: ScoreJob) -> list[Observation]:
        """What the engine says, and whether it was scheduled to accept it."""
        position = self._position(job)
        observations = await self._engine.score(job)
        if job.choices and self._guesses:
            return [
                replace(seen, choices=self._chosen(token_ids, position))
                for seen, token_ids in zip(observations, job.continuations, strict=True)
            ]
        if job.distributions is None:
            is_accepted = self._schedule.accepted[self._schedule.step_at(position)]
            logprob = 0.0 if is_accepted else _REFUSED
            return [
                replace(seen, token_logprobs=np.full_like(seen.token_logprobs, logprob))
                for seen in observations
            ]
        return [
            replace(seen, distributions=self._decided(seen.distributions, token_ids, position))
            for seen, token_ids in zip(observations, job.continuations, strict=True)
        ]

    def release(self, key: Hashable) -> None:
        """The problem is over."""
        self._prompt_lengths.pop(key, None)
        self._engine.release(key)

    def _position(self, job: GenerateJob | ScoreJob) -> int:
        """Behind the prompt, which is the prefix of a problem's first job."""
        return len(job.prefix) - self._prompt_lengths.setdefault(job.key, len(job.prefix))

    def _chosen(self, token_ids: Sequence[int], position: int) -> tuple[int, ...]:
        """The tokens that are accepted, and others in place of those that are not."""
        accepted = self._schedule.accepted_tokens[position:]
        pairs = zip(token_ids, accepted, strict=False)
        chosen = [token_id if is_accepted else token_id - 1 for token_id, is_accepted in pairs]
        return (*chosen, *token_ids[len(chosen) :], token_ids[0])

    def _decided(
        self, distributions: FloatArray | None, token_ids: Sequence[int], position: int
    ) -> FloatArray:
        """Rows [n + 1, V] that accept or refuse each token whatever the draft's were."""
        rows = np.array(distributions)
        accepted = self._schedule.accepted_tokens[position:]
        for row, token_id, is_accepted in zip(rows, token_ids, accepted, strict=False):
            if is_accepted:
                row[token_id] = 2.0  # above any probability
            else:
                row[:] = 0.0
                row[token_id - 1] = 1.0
        return rows


class _Numbering:
    """A tokenizer whose texts are running numbers: they end, answer and repeat nothing."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocabulary = tokenizer.vocabulary
        self.eos_ids: frozenset[int] = frozenset()
        self._numbers = count()

    def encode_prompt(self, problem: str, system_prompt: str | None, thinking: bool) -> Prompt:
        return self._tokenizer.encode_prompt(problem, system_prompt, thinking)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        return f"{next(self._numbers)} "


def replaying(solver: Solver, schedule: Schedule, guesses: bool = False) -> Solver:
    """The solver's pair over a schedule; the target's log-probability alone decides.

    ``guesses`` is for method "sd".
    """
    assert solver.draft is not None
    assert solver.target is not None
    config = SolveConfig(
        selector="target",
        verifier=VerifierConfig(model="target", weights={"log_prob": 1.0}),
        max_tokens=schedule.num_tokens,
        max_step_tokens=schedule.num_tokens,
        max_steps=schedule.num_tokens,
    )
    draft, target = (Replayed(model, schedule, guesses) for model in (solver.draft, solver.target))
    return Solver(draft, target, config)

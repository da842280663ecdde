"""The seam between the step loop and whatever runs a model: token ids in, observations out.

An `Engine` has two verbs, `generate` and `score`. It keeps what it likes of earlier jobs, and no
result depends on what it has kept. Everything in `specguard.core` is written against this page and
knows no framework, no cache and no other problem.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, log
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from specguard.core.checks import check_types
from specguard.core.errors import UsageError

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]

CandidateFinish = Literal["delimiter", "eos", "length"]
# Called with a candidate's index in its job and its new tokens.
OnTokens = Callable[[int, tuple[int, ...]], None]

# What an engine can do beyond the required. "scoring": it observes given tokens, which only a
# draft can do without. "choices": it says what it would have written in their place. "exact
# randomness": tokens follow the job's uniforms, so that every such engine draws the same.
# "confidence": it ends a candidate where the job says so of how probable it is.
Feature = Literal[
    "scoring",
    "choices",
    "attention",
    "hidden states",
    "entropy",
    "exact randomness",
    "distributions",
    "confidence",
]
ALL_FEATURES: frozenset[Feature] = frozenset(get_args(Feature))


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of a prompt and the half-open token range that holds the user's problem."""

    token_ids: tuple[int, ...]
    problem_span: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; temperature 0 is greedy and ignores ``top_p``.

    Raises:
        UsageError: temperature neither 0 nor from 0.001 on, or top_p outside (0, 1].
    """

    temperature: float = 0.7
    top_p: float = 0.8

    def __post_init__(self) -> None:
        check_types(self)
        if self.temperature != 0 and not 1e-3 <= self.temperature < float("inf"):
            raise UsageError(
                f"temperature must be 0 (greedy) or from 0.001 on, not {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must lie in (0, 1], not {self.top_p}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken, whatever the randomness."""
        return self.temperature == 0


GREEDY = Sampling(temperature=0.0, top_p=1.0)


@dataclass(frozen=True, slots=True)
class Boundary:
    """Where a step ends: with the token that completes ``delimiter``, at EOS, or at the cap.

    A delimiter counts only once there is text that is not blank, so a step never consists of
    blank lines. An empty delimiter never matches: the step runs to EOS or to the cap. ``begun``
    are the step's tokens that stand already, the last ones of the prefix, in which a delimiter may
    have begun; ``max_tokens`` counts those that follow.

    Raises:
        UsageError: ``max_tokens`` below 1.
    """

    delimiter: str
    eos_ids: frozenset[int]
    max_tokens: int
    begun: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"a step must have room for one token, not {self.max_tokens}")


@dataclass(frozen=True, slots=True, eq=False)
class Capture:
    """What is to be read of the attention while continuations are scored.

    ``is_source`` [c] splits the c tokens of the prefix into grounding sources (True) and sinks.
    Weights below ``epsilon`` and weights on sinks are dropped before rows are renormalised. Blocks
    come from the last ``num_layers`` layers.
    """

    is_source: BoolArray
    num_layers: int = 3
    epsilon: float = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class AttentionBlock:
    """One layer's attention, averaged over heads, in the n rows that predict a step's tokens.

    Rows and the columns of ``step`` [n, n] are positions c-1 .. c+n-2. ``source_mass`` [n] and
    ``step`` are of the weights with those below epsilon and the sinks dropped, renormalised per
    head; a row left empty points to its own token. ``sink_mass`` [n] is what the softmax itself
    puts on the sinks.
    """

    source_mass: FloatArray
    sink_mass: FloatArray
    step: FloatArray


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class GenerateJob:
    """Sample ``num_candidates`` steps behind ``prefix``.

    Args:
        key: the problem and role that the job belongs to: a hint for the engine's cache.
        prefix: token ids, at least one.
        num_candidates: how many.
        sampling: how tokens are drawn.
        boundary: where a step ends.
        seed: of engines with a randomness of their own.
        uniforms: [num_candidates, boundary.max_tokens] in [0, 1), for engines with exact
            randomness: token t of a candidate is the inverse CDF, in order of token ids, of its
            uniform t.
        first_candidate: how many candidates of this step earlier jobs have drawn; these are
            further ones, and any of them may be continued.
        hidden_states: whether candidates need an ``embedding``.
        distributions: whether candidates need their ``distributions``.
        least_confidence: a candidate ends, as at its cap, with the token by which the product of
            its tokens' probabilities (temperature 1) falls below; 0: never. Engines without the
            feature go on.
        on_tokens: who listens while candidates are drawn. A hint: an engine may call it late, with
            many tokens or not at all, in the thread of its caller and before the job is done. It
            never takes tokens back. What a call raises is the outcome of the job.

    Raises:
        ValueError: no prefix, no candidates, uniforms of another shape, or a confidence that is no
            probability.
    """

    key: Hashable
    prefix: tuple[int, ...]
    sampling: Sampling
    boundary: Boundary
    num_candidates: int = 1
    seed: int = 0
    uniforms: FloatArray | None = None
    first_candidate: int = 0
    hidden_states: bool = False
    distributions: bool = False
    least_confidence: float = 0.0
    on_tokens: OnTokens | None = None

    def __post_init__(self) -> None:
        _check_prefix(self.prefix)
        if self.num_candidates < 1:
            raise ValueError("a step needs at least one candidate")
        if not 0 <= self.least_confidence < 1:
            raise ValueError(f"a confidence lies in [0, 1), not {self.least_confidence}")
        shape = self.num_candidates, self.boundary.max_tokens
        if self.uniforms is not None and self.uniforms.shape != shape:
            raise ValueError(f"uniforms must have shape {shape}, not {self.uniforms.shape}")


def least_logprob(job: GenerateJob) -> float:
    """Of a candidate that goes on, as its ``least_confidence`` has it; -inf: it goes on anyway."""
    return log(job.least_confidence) if job.least_confidence else -inf


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ScoreJob:
    """Observe each of ``continuations`` behind ``prefix``, none of which sees another.

    Args:
        key: as in `GenerateJob`.
        prefix: token ids, at least one.
        continuations: token ids, one or more each.
        capture: what to read of the attention, None for nothing.
        hidden_state: whether observations need their ``hidden_state``.
        distributions: how the distributions of the observations are warped, None for none.
        choices: whether observations need their ``choices``.

    Raises:
        ValueError: no prefix, an empty continuation, or a capture of another context.
    """

    key: Hashable
    prefix: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    capture: Capture | None = None
    hidden_state: bool = False
    distributions: Sampling | None = None
    choices: bool = False

    def __post_init__(self) -> None:
        _check_prefix(self.prefix)
        if not self.continuations or not all(self.continuations):
            raise ValueError("continuations need at least one token each, and there must be one")
        if self.capture is not None and len(self.capture.is_source) != len(self.prefix):
            raise ValueError("a capture must mark every token of the prefix as source or sink")


def _check_prefix(prefix: tuple[int, ...]) -> None:
    if not prefix:
        raise ValueError("a prefix needs at least one token")


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A sampled step of n tokens, an EOS token included.

    ``token_logprobs`` and ``token_entropies`` [n] are of the raw distribution (temperature 1, no
    top-p, natural logarithm). ``embedding`` [hidden] is the mean of the final hidden states that
    predicted the tokens, ``distributions`` [n, vocabulary] what they were drawn from. What the job
    did not ask for, or the engine cannot do, is None.
    """

    token_ids: tuple[int, ...]
    text: str
    token_logprobs: FloatArray
    finish: CandidateFinish
    token_entropies: FloatArray | None = None
    embedding: FloatArray | None = None
    distributions: FloatArray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """What a parallel pass over n given tokens says of them.

    ``token_logprobs`` and ``token_entropies`` [n] as in `Candidate`; ``is_first_choice`` [n] says
    of each token whether the model itself finds it most probable. ``blocks`` runs from the lowest
    captured layer to the top one. ``hidden_state`` [hidden] is the final hidden state that
    predicted the last token. ``distributions`` [n + 1, vocabulary] are the warped ones of the n
    tokens and of the one that would follow; ``choices`` [n + 1] are the most probable tokens there.
    """

    token_logprobs: FloatArray
    is_first_choice: BoolArray
    token_entropies: FloatArray | None = None
    blocks: tuple[AttentionBlock, ...] | None = None
    hidden_state: FloatArray | None = None
    distributions: FloatArray | None = None
    choices: tuple[int, ...] | None = None

    @property
    def num_leading_choices(self) -> int:
        """How many tokens from the beginning on the model would have written itself."""
        others = np.flatnonzero(~self.is_first_choice)
        return int(others[0]) if len(others) else len(self.is_first_choice)


class Tokenizer(Protocol):
    """Text to ids and back, as the model was trained to read it."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a solution."""

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """Every token's name and id, to compare two models by."""

    def encode_prompt(self, problem: str, system_prompt: str | None, thinking: bool) -> Prompt:
        """The problem in the chat template, or as it is where there is none."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, no special tokens added."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids; special tokens leave no trace in it."""


class Engine(Protocol):
    """One model, ready to serve any number of problems at once.

    Jobs may come at any time and end in any order. Distributions are over the tokenizer's ids; rows
    that pad a vocabulary are no part of them. Cancelling a job's coroutine ends the job.
    """

    @property
    def name(self) -> str:
        """Folder, hub id or other name to show to the user."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer."""

    @property
    def context_limit(self) -> int:
        """Most tokens that a prefix and what follows it may have."""

    @property
    def features(self) -> frozenset[Feature]:
        """What it can do beyond log-probabilities and first choices."""

    @property
    def reasons(self) -> Mapping[Feature, str]:
        """Why it lacks a feature, where there is a reason to tell."""

    @property
    def num_bytes_per_token(self) -> int:
        """What a token's keys and values take of this process's memory; 0 where they take none."""

    async def generate(self, job: GenerateJob) -> list[Candidate]:
        """The candidates of a job, in order.

        Raises:
            SpecguardError: the job cannot be done: no room in the context window, no memory, a
                server that is gone.
        """

    async def score(self, job: ScoreJob) -> list[Observation]:
        """An observation of each continuation, in order.

        Raises:
            SpecguardError: as in `generate`.
        """

    def release(self, key: Hashable) -> None:
        """The problem is over, whatever its jobs are doing; unknown keys are fine."""

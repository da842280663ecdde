"""The seam between the step loop and a backend: token ids, text and NumPy arrays, never tensors.

A backend implements `LanguageModel` and `TokenSequence`; everything in `specguard.core` is written
against these two and knows no framework. All verbs take a batch, so that many problems at once
need no second interface.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from specguard.core.errors import UsageError

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]

CandidateFinish = Literal["delimiter", "eos", "length"]


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
        if self.temperature != 0 and not 1e-3 <= self.temperature < float("inf"):
            raise UsageError(
                f"temperature must be 0 (greedy) or from 0.001 on, not {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must lie in (0, 1], not {self.top_p}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken, whatever the uniforms are."""
        return self.temperature == 0


GREEDY = Sampling(temperature=0.0, top_p=1.0)


@dataclass(frozen=True, slots=True)
class Boundary:
    """Where a step ends: with the token that completes ``delimiter``, at EOS, or at the cap.

    A delimiter counts only once there is text that is not blank, so a step never consists of
    blank lines. An empty delimiter never matches: the step runs to EOS or to the cap. ``written``
    are tokens of the step that stand already, in which a delimiter may have begun; ``max_tokens``
    counts those that follow.

    Raises:
        UsageError: ``max_tokens`` below 1.
    """

    delimiter: str
    eos_ids: frozenset[int]
    max_tokens: int
    written: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"a step must have room for one token, not {self.max_tokens}")


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A sampled step of n tokens, an EOS token included; nothing of it is in the sequence yet.

    ``token_logprobs`` and ``token_entropies`` [n] are of the raw distribution (temperature 1, no
    top-p, natural logarithm). ``embedding`` [hidden] is the mean of the final hidden states that
    predicted the tokens. ``handle`` is the backend's way to the KV and, where they were kept, to
    the warped distributions; it is valid until its sequence changes.
    """

    token_ids: tuple[int, ...]
    text: str
    token_logprobs: FloatArray
    token_entropies: FloatArray
    finish: CandidateFinish
    embedding: FloatArray
    handle: object = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Capture:
    """What `LanguageModel.extend` is to read from the attention of its pass.

    ``is_source`` [c] splits the c tokens that the sequence holds before the pass into grounding
    sources (True) and sinks. Weights below ``epsilon`` and weights on sinks are dropped before
    rows are renormalised. Blocks come from the last ``num_layers`` layers.
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


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """What one parallel pass over n given tokens says of them.

    ``token_logprobs`` and ``token_entropies`` [n] as in `Candidate`; the first ``num_greedy``
    tokens are those that the model itself finds most probable. ``blocks`` runs from the lowest
    captured layer to the top one. ``last_hidden_state`` [hidden] is the final hidden state
    that predicted the last token. ``handle`` is the backend's way to the KV where the pass was
    `LanguageModel.score`: a `Candidate` that carries it can be committed.
    """

    token_logprobs: FloatArray
    token_entropies: FloatArray
    blocks: tuple[AttentionBlock, ...] | None = None
    last_hidden_state: FloatArray | None = None
    num_greedy: int = 0
    handle: object = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Acceptance:
    """Outcome of token-level speculative sampling over one candidate.

    ``token_ids`` are the ``num_accepted`` tokens kept and then the corrected or bonus token, where
    there is one; ``token_logprobs`` are the judging model's own, at temperature 1.
    """

    num_accepted: int
    token_ids: tuple[int, ...]
    token_logprobs: FloatArray


class TokenSequence(Protocol):
    """A handle into a backend's KV pool; its last token is pending, not yet forwarded."""

    @property
    def token_ids(self) -> Sequence[int]:
        """Prompt and everything committed or extended since."""

    @property
    def is_closed(self) -> bool:
        """Whether the KV has been given back."""

    def fork(self) -> "TokenSequence":
        """An independent sequence with the same tokens; the common KV is not computed again."""

    def close(self) -> None:
        """Give the KV back. Closing twice is fine; every other verb on a closed one raises."""


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


S = TypeVar("S", bound=TokenSequence)


class Drafting(Protocol[S]):
    """`LanguageModel.propose` for sequences that come and go: who is done makes room for others."""

    def add(self, sequence: S, boundary: Boundary, uniforms: FloatArray) -> None:
        """A sequence joins; ``uniforms`` [num_candidates, boundary.max_tokens].

        Until its candidates are there, nothing else may be done with it. What is refused has not
        joined, and leaves the others as they are.
        """

    def run(self, num_wanted: int) -> list[tuple[S, list[Candidate]]]:
        """Draw on until at least so many sequences more, or all, have their candidates.

        After an error the drafting is of no more use; the sequences are as they were.
        """


class LanguageModel(Protocol[S]):
    """A model as the step loop sees it.

    Its distributions are over the tokenizer's ids; rows that pad a vocabulary are no part of them.
    Every verb takes B sequences and as many of whatever goes with them. Sequences in one call are
    distinct and of this model.
    """

    @property
    def name(self) -> str:
        """Folder, hub id or other name to show to the user."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer."""

    @property
    def context_limit(self) -> int:
        """Most tokens that a sequence may hold."""

    @property
    def capture_refusal(self) -> str | None:
        """Why `extend` cannot capture attention, or None where it can."""

    @property
    def num_bytes_per_token(self) -> int:
        """What one token's keys and values take."""

    def start(self, prompt: Prompt, prefix: S | None = None) -> S:
        """Read a prompt once; all but its last token are forwarded.

        ``prefix`` holds the prompt's first tokens: it stays as it is, and they are not read again.
        """

    def propose(
        self,
        sequences: Sequence[S],
        num_candidates: int,
        sampling: Sampling,
        boundaries: Sequence[Boundary],
        uniforms: FloatArray,
        keep_distributions: bool = False,
    ) -> list[list[Candidate]]:
        """Sample ``num_candidates`` steps for each sequence, which stay as they are.

        Each has a boundary of its own. ``uniforms`` [B, num_candidates, the largest max_tokens of
        the boundaries] in [0, 1): token t of a candidate is
        the inverse CDF, in order of token ids, of its uniform t.
        """

    def drafting(
        self, num_candidates: int, sampling: Sampling, keep_distributions: bool = False
    ) -> Drafting[S]:
        """The same, begun without a sequence. `WholeDrafting` is one that calls `propose`."""

    def commit(self, sequences: Sequence[S], candidates: Sequence[Candidate]) -> None:
        """Append a candidate that this model proposed or scored; its KV is not computed again."""

    def extend(
        self,
        sequences: Sequence[S],
        continuations: Sequence[Sequence[int]],
        captures: Sequence[Capture | None] | None = None,
        hidden_state: bool = False,
    ) -> list[Observation]:
        """Append the given tokens (one or more each) in one parallel pass and observe them."""

    def score(
        self,
        sequences: Sequence[S],
        continuations: Sequence[Sequence[Sequence[int]]],
        captures: Sequence[Capture | None] | None = None,
    ) -> list[list[Observation]]:
        """Observe several continuations of each sequence; the sequences stay as they are.

        One pass over one copy of each prefix, whatever the number of continuations. To keep one of
        them, `commit` a candidate with its token ids and its observation's ``handle``.
        """

    def accept(
        self,
        sequences: Sequence[S],
        candidates: Sequence[Candidate],
        sampling: Sampling,
        uniforms: FloatArray,
    ) -> list[Acceptance]:
        """Token-level speculative sampling (Leviathan et al. 2023, algorithm 1).

        Judges candidates of n tokens that another model proposed with ``keep_distributions`` and
        the same ``sampling``, and appends what `Acceptance` says. ``uniforms`` [B, n_max + 1]:
        entry t judges token t, entry n draws the corrected or bonus token. A bonus token is drawn
        only for a candidate cut by its cap: after EOS or a delimiter the step is over.
        """

    def rewind(self, sequence: S, length: int) -> None:
        """Cut the sequence back to its first ``length`` tokens (at least 1)."""

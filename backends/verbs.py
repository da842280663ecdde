"""What the verbs of every built-in backend share: checks of arguments, candidates in the making.

Knows the seam and NumPy, and no framework.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from specguard.core.errors import SpecguardError
from specguard.core.model import (
    Boundary,
    Candidate,
    CandidateFinish,
    Capture,
    Drafting,
    FloatArray,
    Prompt,
    Tokenizer,
    TokenSequence,
)
from specguard.core.text import PieceTable, StepScanner

S = TypeVar("S", bound=TokenSequence)


@dataclass(slots=True)
class Draft:
    """A candidate in the making: its tokens, and the columns of its KV."""

    scanner: StepScanner
    columns: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish: CandidateFinish | None = None

    def take(self, token_id: int) -> bool:
        """Append a token; whether the step goes on."""
        self.token_ids.append(token_id)
        self.finish = self.scanner.feed(token_id)
        return self.finish is None


class OpenDrafts:
    """Candidates in the making by their numbers, and the uniforms that they are drawn by."""

    def __init__(self, pieces: PieceTable, num_candidates: int) -> None:
        if num_candidates < 1:
            raise ValueError("a step needs at least one candidate")
        self._pieces, self._num_candidates = pieces, num_candidates
        self._numbers = count()
        self._uniforms: dict[int, FloatArray] = {}
        self.drafts: dict[int, Draft] = {}

    def add(self, boundary: Boundary, uniforms: FloatArray) -> dict[int, Draft]:
        """The candidates of one more sequence.

        Raises:
            ValueError: ``uniforms`` are not [num_candidates, boundary.max_tokens].
        """
        shape = self._num_candidates, boundary.max_tokens
        if uniforms.shape != shape:
            raise ValueError(f"uniforms must have shape {shape}, not {uniforms.shape}")
        added = {next(self._numbers): Draft(StepScanner(self._pieces, boundary)) for _ in uniforms}
        self.drafts |= added
        self._uniforms |= zip(added, uniforms, strict=True)
        return added

    def uniforms(self, numbers: Sequence[int]) -> FloatArray:
        """The uniform [N] of each one's next token."""
        return np.array([self._uniforms[i][len(self.drafts[i].token_ids)] for i in numbers])

    def is_last(self, numbers: Sequence[int]) -> bool:
        """Whether the next token ends all of these, whatever it is."""
        return all(len(self._uniforms[i]) == len(self.drafts[i].token_ids) + 1 for i in numbers)

    def drop(self, numbers: Iterable[int]) -> None:
        """These are done."""
        for number in numbers:
            del self.drafts[number], self._uniforms[number]


def propose_by(
    drafting: Drafting[S],
    sequences: Sequence[S],
    boundaries: Sequence[Boundary],
    uniforms: FloatArray,
) -> list[list[Candidate]]:
    """`LanguageModel.propose` by a fresh drafting that all sequences join at once."""
    check_proposal(sequences, boundaries, uniforms)
    for sequence, boundary, draws in zip(sequences, boundaries, uniforms, strict=True):
        drafting.add(sequence, boundary, draws[:, : boundary.max_tokens])
    found = {id(sequence): candidates for sequence, candidates in drafting.run(len(sequences))}
    return [found[id(sequence)] for sequence in sequences]


def check_prompt(prompt: Prompt, prefix: TokenSequence | None) -> None:
    """Refuse an empty prompt, and a prefix that is not how it begins."""
    if not prompt.token_ids:
        raise ValueError("a prompt needs at least one token")
    if prefix is not None:
        known = tuple(prefix.token_ids)
        if known != prompt.token_ids[: len(known)]:
            raise ValueError("the prompt does not begin with the prefix")


def check_sequences(sequences: Sequence[TokenSequence]) -> None:
    """Refuse no sequences and one given twice."""
    if len({id(sequence) for sequence in sequences}) != len(sequences) or not sequences:
        raise ValueError("a call needs distinct sequences, at least one")


def check_proposal(
    sequences: Sequence[TokenSequence], boundaries: Sequence[Boundary], uniforms: FloatArray
) -> None:
    """Refuse sequences that are not distinct, and arguments that do not go with them."""
    check_sequences(sequences)
    if len(boundaries) != len(sequences):
        raise ValueError(f"{len(sequences)} sequences need a boundary each, not {len(boundaries)}")
    most = max(boundary.max_tokens for boundary in boundaries)
    if uniforms.shape[::2] != (len(sequences), most):
        raise ValueError(
            f"uniforms must have shape ({len(sequences)}, candidates, {most}), not {uniforms.shape}"
        )


def check_continuations(
    sequences: Sequence[TokenSequence],
    continuations: Sequence[Sequence[int]],
    captures: Sequence[Capture | None],
    name: str,
    capture_refusal: str | None,
) -> None:
    """Refuse empty continuations, captures of another context, and captures that cannot be had."""
    for sequence, token_ids, capture in zip(sequences, continuations, captures, strict=True):
        if not token_ids:
            raise ValueError("a continuation needs at least one token")
        if capture is None:
            continue
        if len(capture.is_source) != len(sequence.token_ids):
            raise ValueError("a capture must mark every context token as source or sink")
        if capture_refusal is not None:
            raise SpecguardError(
                f"the attention of {name} cannot be captured: {capture_refusal}",
                "verify by log-probability alone: --beta 1",
            )


def check_alternatives(
    sequences: Sequence[TokenSequence],
    continuations: Sequence[Sequence[Sequence[int]]],
    captures: Sequence[Capture | None],
    name: str,
    capture_refusal: str | None,
) -> None:
    """Refuse what `check_continuations` refuses, and a sequence without a continuation."""
    for sequence, found, capture in zip(sequences, continuations, captures, strict=True):
        if not found:
            raise ValueError("a sequence needs at least one continuation")
        for token_ids in found:
            check_continuations([sequence], [token_ids], [capture], name, capture_refusal)


def check_room(sequence: TokenSequence, num_new: int, limit: int) -> None:
    """Refuse more tokens than the context window holds."""
    wanted = len(sequence.token_ids) + num_new
    if wanted > limit:
        raise SpecguardError(
            f"{wanted} tokens do not fit the context window of {limit}",
            "shorten the problem or choose a model with a longer context",
        )


def check_length(sequence: TokenSequence, length: int) -> None:
    """Refuse to rewind to nothing, or to what is not there yet."""
    if not 1 <= length <= len(sequence.token_ids):
        raise ValueError(f"cannot rewind {len(sequence.token_ids)} tokens to {length}")


def count_accepted(p: Sequence[float], q: Sequence[float], uniforms: FloatArray) -> int:
    """How many drafted tokens in a row are accepted, each with probability min(1, p/q).

    Args:
        p: what the judging model gives the drafted tokens.
        q: what the drafting model gave them.
        uniforms: one in [0, 1) for each token, more are ignored.
    """
    for position, (judged, drafted) in enumerate(zip(p, q, strict=True)):
        if uniforms[position] * drafted >= judged:
            return position
    return len(p)


def count_leading(found: NDArray[np.integer], wanted: Sequence[int]) -> int:
    """How many token ids at the beginning are those that are wanted."""
    differs = np.flatnonzero(np.asarray(found) != np.asarray(wanted))
    return int(differs[0]) if len(differs) else len(wanted)


def finish_candidates(
    name: str,
    tokenizer: Tokenizer,
    drafts: Sequence[Draft],
    owners: NDArray[np.integer],
    logprobs: FloatArray,
    entropies: FloatArray,
    hidden_sums: FloatArray,
    handles: Sequence[object],
) -> list[Candidate]:
    """Candidates from what was gathered token by token.

    Args:
        name: of the model, for the error.
        tokenizer: decodes their text.
        drafts: the candidates, finished.
        owners: [N], the index of the draft that each drawn token belongs to, in order of drawing.
        logprobs: [N] of these tokens.
        entropies: [N] of the distributions that they were drawn from.
        hidden_sums: [drafts, hidden], sums of the hidden states that predicted each one's tokens.
        handles: one for each candidate.

    Raises:
        SpecguardError: a log-probability is not finite.
    """
    if not np.isfinite(logprobs).all():
        raise SpecguardError(
            f"{name} gives probabilities that are not finite",
            "try --dtype float32; the weights may be damaged",
        )
    candidates = []
    for index, (draft, handle) in enumerate(zip(drafts, handles, strict=True)):
        assert draft.finish is not None
        mine = owners == index
        candidates.append(
            Candidate(
                token_ids=tuple(draft.token_ids),
                text=tokenizer.decode(draft.token_ids),
                token_logprobs=logprobs[mine],
                token_entropies=entropies[mine],
                finish=draft.finish,
                embedding=hidden_sums[index] / len(draft.token_ids),
                handle=handle,
            )
        )
    return candidates

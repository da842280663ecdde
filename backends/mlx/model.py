"""The seam's verbs over an mlx-lm model."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from specguard.backends.mlx.attention import Row
from specguard.backends.mlx.decoding import (
    CHUNK,
    Handle,
    MlxSequence,
    Next,
    offset,
    slot_row,
    to_numpy,
)
from specguard.backends.mlx.drafting import MlxDrafting
from specguard.backends.mlx.forward import Forward, attention_blocks
from specguard.backends.mlx.sampling import accept_tokens, describe, warp
from specguard.backends.verbs import (
    check_alternatives,
    check_continuations,
    check_length,
    check_prompt,
    check_room,
    check_sequences,
    count_leading,
    propose_by,
)
from specguard.core.model import (
    Acceptance,
    Boundary,
    Candidate,
    Capture,
    FloatArray,
    Observation,
    Prompt,
    Sampling,
    Tokenizer,
)
from specguard.core.text import PieceTable

P = ParamSpec("P")
R = TypeVar("R")


def _names_memory_errors(
    verb: "Callable[Concatenate[MlxModel, P], R]",
) -> "Callable[Concatenate[MlxModel, P], R]":
    @wraps(verb)
    def guarded(model: "MlxModel", /, *args: P.args, **kwargs: P.kwargs) -> R:
        with model._forward.memory_errors():
            return verb(model, *args, **kwargs)

    return guarded


class MlxModel:
    """A `LanguageModel` on MLX. Make one with `specguard.backends.mlx.loading.load_model`."""

    capture_refusal: str | None = None

    def __init__(
        self, name: str, forward: Forward, tokenizer: Tokenizer, context_limit: int
    ) -> None:
        self._name = name
        self._forward = forward
        self._tokenizer = tokenizer
        self._context_limit = context_limit
        self._pieces = PieceTable(tokenizer)

    @property
    def name(self) -> str:
        """Folder or hub id."""
        return self._name

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer."""
        return self._tokenizer

    @property
    def context_limit(self) -> int:
        """Most tokens that a sequence may hold."""
        return self._context_limit

    @property
    def num_bytes_per_token(self) -> int:
        """What one token's keys and values take."""
        return self._forward.num_bytes_per_token

    @_names_memory_errors
    def start(self, prompt: Prompt, prefix: MlxSequence | None = None) -> MlxSequence:
        """Forward all tokens of the prompt but the last."""
        check_prompt(prompt, prefix)
        if prefix is None:
            sequence = MlxSequence([prompt.token_ids[0]], self._forward.new_buffer())
        else:
            sequence = prefix.fork()
        num_known, num_cached = len(sequence.token_ids), sequence.num_cached
        check_room(sequence, len(prompt.token_ids) - num_known, self.context_limit)
        self._forward.prefill(sequence.writable(), prompt.token_ids[num_cached:-1], num_cached)
        sequence.append(prompt.token_ids[num_known:])
        return sequence

    def propose(
        self,
        sequences: Sequence[MlxSequence],
        num_candidates: int,
        sampling: Sampling,
        boundaries: Sequence[Boundary],
        uniforms: FloatArray,
        keep_distributions: bool = False,
    ) -> list[list[Candidate]]:
        """Sample steps, all sequences and candidates side by side; each stops at its boundary."""
        drafting = self.drafting(num_candidates, sampling, keep_distributions)
        return propose_by(drafting, sequences, boundaries, uniforms)

    def drafting(
        self, num_candidates: int, sampling: Sampling, keep_distributions: bool = False
    ) -> MlxDrafting:
        """What ``propose`` does, for sequences that come and go."""
        return MlxDrafting(
            self._name,
            self._forward,
            self._after_pending,
            self._tokenizer,
            self._pieces,
            self._context_limit,
            num_candidates,
            sampling,
            keep_distributions,
        )

    @_names_memory_errors
    def commit(self, sequences: Sequence[MlxSequence], candidates: Sequence[Candidate]) -> None:
        """Move a candidate's columns to the end of its sequence."""
        for sequence, candidate in zip(sequences, candidates, strict=True):
            buffer, handle = sequence.writable(), candidate.handle
            if (
                not isinstance(handle, Handle)
                or handle.sequence is not sequence
                or handle.version != sequence.version
            ):
                raise ValueError("the candidate is stale or of another sequence")
            start, columns = handle.start, handle.columns
            if columns != list(range(start, start + len(columns))):
                buffer.move_columns(start, columns)
                mx.async_eval(buffer.arrays())
            sequence.append(candidate.token_ids)
            sequence.ahead = handle.ahead

    @_names_memory_errors
    def extend(
        self,
        sequences: Sequence[MlxSequence],
        continuations: Sequence[Sequence[int]],
        captures: Sequence[Capture | None] | None = None,
        hidden_state: bool = False,
    ) -> list[Observation]:
        """Forward the pending tokens and all but the last of the new ones; observe the new ones."""
        captures = captures if captures is not None else [None] * len(sequences)
        check_sequences(sequences)
        check_continuations(sequences, continuations, captures, self.name, self.capture_refusal)
        for sequence, token_ids in zip(sequences, continuations, strict=True):
            check_room(sequence, len(token_ids), self.context_limit)
        inputs = [
            [sequence.token_ids[-1], *token_ids[:-1]]
            for sequence, token_ids in zip(sequences, continuations, strict=True)
        ]
        rows, hidden = self._read(sequences, inputs, captures)
        wanted = [token_id for token_ids in continuations for token_id in token_ids]
        all_logprobs, all_entropies, greedy = self._describe(hidden, wanted, rows)
        observations = []
        stop = 0
        for sequence, token_ids, row in zip(sequences, continuations, rows, strict=True):
            start, stop = stop, stop + len(token_ids)
            sequence.append(token_ids)
            observations.append(
                Observation(
                    token_logprobs=all_logprobs[start:stop],
                    token_entropies=all_entropies[start:stop],
                    num_greedy=count_leading(greedy[start:stop], token_ids),
                    blocks=attention_blocks(row.captures[0]) if row.captures else None,
                    last_hidden_state=to_numpy(hidden[stop - 1]) if hidden_state else None,
                )
            )
        return observations

    @_names_memory_errors
    def score(
        self,
        sequences: Sequence[MlxSequence],
        continuations: Sequence[Sequence[Sequence[int]]],
        captures: Sequence[Capture | None] | None = None,
    ) -> list[list[Observation]]:
        """Forward each continuation in a slot of its own behind one copy of its prefix."""
        captures = captures if captures is not None else [None] * len(sequences)
        check_sequences(sequences)
        check_alternatives(sequences, continuations, captures, self.name, self.capture_refusal)
        rows, inputs = [], []
        for sequence, found, capture in zip(sequences, continuations, captures, strict=True):
            width = max(map(len, found))
            check_room(sequence, width, self.context_limit)
            row = slot_row(sequence.writable(), sequence.num_cached, len(found), width)
            if capture is not None:
                row.captures = [self._forward.row_capture(capture, len(ids)) for ids in found]
            rows.append(row)
            inputs += [[sequence.token_ids[-1], *token_ids[:-1]] for token_ids in found]
            sequence.version += 1  # the columns behind the sequence are about to be written
        width = max(map(len, inputs))
        tokens = mx.array([row + [0] * (width - len(row)) for row in inputs])
        positions = [row.start for row in rows for _ in range(row.num_slots)]
        hidden = self._forward.run(rows, tokens, offset(positions))
        predicting = mx.concatenate([hidden[i, : len(row)] for i, row in enumerate(inputs)])
        wanted = [token_id for found in continuations for ids in found for token_id in ids]
        all_logprobs, all_entropies, greedy = self._describe(predicting, wanted, rows)
        observations: list[list[Observation]] = []
        stop = 0
        for sequence, found, row in zip(sequences, continuations, rows, strict=True):
            mx.async_eval(row.buffer.arrays())
            observations.append([])
            for slot, token_ids in enumerate(found):
                start, stop = stop, stop + len(token_ids)
                first = row.start + slot * row.length
                columns = list(range(first, first + len(token_ids)))
                observations[-1].append(
                    Observation(
                        token_logprobs=all_logprobs[start:stop],
                        token_entropies=all_entropies[start:stop],
                        num_greedy=count_leading(greedy[start:stop], token_ids),
                        blocks=attention_blocks(row.captures[slot]) if row.captures else None,
                        handle=Handle(sequence, sequence.version, row.start, columns),
                    )
                )
        return observations

    @_names_memory_errors
    def accept(
        self,
        sequences: Sequence[MlxSequence],
        candidates: Sequence[Candidate],
        sampling: Sampling,
        uniforms: FloatArray,
    ) -> list[Acceptance]:
        """Judge drafted tokens in one pass; keep the longest accepted run and what follows it."""
        check_sequences(sequences)
        inputs = []
        for sequence, candidate in zip(sequences, candidates, strict=True):
            if not isinstance(candidate.handle, Handle) or candidate.handle.distributions is None:
                raise ValueError("the candidate was proposed without keep_distributions")
            check_room(sequence, len(candidate.token_ids), self.context_limit)
            inputs.append([sequence.token_ids[-1], *candidate.token_ids])
        _, hidden = self._read(sequences, inputs)
        acceptances = []
        stop = 0
        for index, (sequence, candidate) in enumerate(zip(sequences, candidates, strict=True)):
            assert isinstance(candidate.handle, Handle)
            drafted = candidate.handle.distributions
            assert drafted is not None
            start, stop = stop, stop + len(inputs[index])
            logits = self._forward.logits(hidden[start:stop])
            num_accepted, token_ids = accept_tokens(
                warp(logits, sampling), drafted, candidate, uniforms[index]
            )
            has_room = len(sequence.token_ids) + len(token_ids) <= self.context_limit
            token_ids = token_ids if has_room else token_ids[:-1]
            logprobs, _ = describe(logits[: len(token_ids)], mx.array(token_ids))
            sequence.append(token_ids)
            acceptances.append(Acceptance(num_accepted, tuple(token_ids), to_numpy(logprobs)))
        return acceptances

    def rewind(self, sequence: MlxSequence, length: int) -> None:
        """Cut the sequence back; the KV behind it is overwritten by what comes next."""
        sequence.readable()
        check_length(sequence, length)
        sequence.truncate(length)

    def _describe(
        self, hidden: mx.array, token_ids: list[int], rows: list[Row]
    ) -> tuple[FloatArray, FloatArray, NDArray[np.integer]]:
        """Log-probs, entropies and best ids [N] by the hidden states that predict tokens [N]."""
        wanted = mx.array(token_ids)
        blocks = [capture.blocks for row in rows for capture in row.captures]
        parts = []
        for start in range(0, len(wanted), CHUNK):
            logits = self._forward.logits(hidden[start : start + CHUNK])
            described = describe(logits, wanted[start : start + CHUNK])
            parts.append((*described, mx.argmax(logits, axis=-1)))
            mx.eval(parts[-1], blocks)
        logprobs, entropies, best = (np.concatenate(part) for part in zip(*parts, strict=True))
        return logprobs, entropies, best

    def _after_pending(self, sequences: Sequence[MlxSequence]) -> Next:
        """What follows each sequence; pending tokens are forwarded where that is not done yet."""
        waiting = [sequence for sequence in sequences if sequence.ahead is None]
        if waiting:
            _, hidden = self._read(waiting, [[sequence.token_ids[-1]] for sequence in waiting])
            following = Next(hidden, self._forward.logits(hidden))
            for slot, sequence in enumerate(waiting):
                sequence.ahead = following.take([slot]) if len(waiting) > 1 else following
                mx.async_eval(sequence.ahead)
        known = [sequence.ahead for sequence in sequences if sequence.ahead is not None]
        if len(known) == 1:
            return known[0]
        return Next(*(mx.concatenate(part) for part in zip(*known, strict=True)))

    def _read(
        self,
        sequences: Sequence[MlxSequence],
        inputs: list[list[int]],
        captures: Sequence[Capture | None] | None = None,
    ) -> tuple[list[Row], mx.array]:
        """One causal pass over given tokens: its rows, hidden states [all tokens, H] in order."""
        rows = []
        for sequence, tokens in zip(sequences, inputs, strict=True):
            rows.append(Row(sequence.writable(), sequence.num_cached, length=len(tokens)))
            sequence.version += 1
        for row, capture in zip(rows, captures or [None] * len(rows), strict=True):
            if capture is not None:
                row.captures = [self._forward.row_capture(capture, row.length)]
        width = max(map(len, inputs))
        tokens = mx.array([row + [0] * (width - len(row)) for row in inputs])
        positions = [sequence.num_cached for sequence in sequences]
        hidden = self._forward.run(rows, tokens, offset(positions))
        if len(rows) == 1:
            return rows, hidden[0]
        return rows, mx.concatenate([hidden[i, : len(row)] for i, row in enumerate(inputs)])

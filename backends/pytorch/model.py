"""The seam's verbs over a transformers causal language model."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specguard.backends.pytorch.drafting import TorchDrafting
from specguard.backends.pytorch.forward import Forward, Layout, PassOutput, Reading
from specguard.backends.pytorch.kv import Handle, KVBuffer, TorchSequence
from specguard.backends.pytorch.sampling import accept_tokens, describe, warp
from specguard.backends.pytorch.scoring import Tree
from specguard.backends.sequence import BufferedSequence
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


class TorchModel:
    """A `LanguageModel` on torch. Make one with `specguard.backends.pytorch.loading.load_model`."""

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

    @property
    def capture_refusal(self) -> str | None:
        """Why attention cannot be captured, or None."""
        return self._forward.capture_refusal

    @torch.inference_mode()
    def start(self, prompt: Prompt, prefix: TorchSequence | None = None) -> TorchSequence:
        """Forward all tokens of the prompt but the last."""
        check_prompt(prompt, prefix)
        if prefix is None:
            sequence = BufferedSequence([prompt.token_ids[0]], self._forward.new_buffer())
        else:
            sequence = prefix.fork()
        num_known, num_cached = len(sequence.token_ids), sequence.num_cached
        check_room(sequence, len(prompt.token_ids) - num_known, self.context_limit)
        unread = prompt.token_ids[num_cached:-1]
        if unread:
            self._forward.prefill(sequence.writable(), unread, num_cached)
        sequence.append(prompt.token_ids[num_known:])
        return sequence

    @torch.inference_mode()
    def propose(
        self,
        sequences: Sequence[TorchSequence],
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
    ) -> TorchDrafting:
        """What ``propose`` does, for sequences that come and go."""
        return TorchDrafting(
            self._name,
            self._forward,
            self._tokenizer,
            self._pieces,
            self._context_limit,
            num_candidates,
            sampling,
            keep_distributions,
        )

    @torch.inference_mode()
    def commit(self, sequences: Sequence[TorchSequence], candidates: Sequence[Candidate]) -> None:
        """Move a candidate's columns to the end of its sequence."""
        for sequence, candidate in zip(sequences, candidates, strict=True):
            handle = candidate.handle
            if (
                not isinstance(handle, Handle)
                or handle.sequence is not sequence
                or handle.version != sequence.version
            ):
                raise ValueError("the candidate is stale or of another sequence")
            self._keep_columns(sequence, handle.buffer, handle.row, handle.columns)
            sequence.append(candidate.token_ids)

    @torch.inference_mode()
    def extend(
        self,
        sequences: Sequence[TorchSequence],
        continuations: Sequence[Sequence[int]],
        captures: Sequence[Capture | None] | None = None,
        hidden_state: bool = False,
    ) -> list[Observation]:
        """Forward the pending tokens and all but the last of the new ones; observe the new ones."""
        captures = captures if captures is not None else [None] * len(sequences)
        check_continuations(sequences, continuations, captures, self.name, self.capture_refusal)
        for sequence, token_ids in zip(sequences, continuations, strict=True):
            check_room(sequence, len(token_ids), self.context_limit)
        inputs = [
            [sequence.token_ids[-1], *token_ids[:-1]]
            for sequence, token_ids in zip(sequences, continuations, strict=True)
        ]
        readings = [
            Reading(capture, row, list(range(len(inputs[row]))))
            for row, capture in enumerate(captures)
            if capture is not None
        ]
        layout, output = self._read(sequences, inputs, readings)
        first_column = layout.num_columns - output.logits.shape[1]
        blocks = iter(output.blocks)
        observations = []
        for row, (sequence, token_ids) in enumerate(zip(sequences, continuations, strict=True)):
            n = len(token_ids)
            wanted = self._forward.tensor(list(token_ids))
            logits = output.logits[row, :n]
            logprobs, entropies = describe(logits, wanted)
            columns = list(range(first_column, first_column + n))
            self._keep_columns(sequence, layout.buffer, row, columns)
            sequence.append(token_ids)
            observations.append(
                Observation(
                    token_logprobs=_numpy(logprobs),
                    token_entropies=_numpy(entropies),
                    num_greedy=count_leading(logits.argmax(-1).cpu().numpy(), token_ids),
                    blocks=None if captures[row] is None else next(blocks),
                    last_hidden_state=_numpy(output.hidden[row, n - 1]) if hidden_state else None,
                )
            )
        return observations

    @torch.inference_mode()
    def score(
        self,
        sequences: Sequence[TorchSequence],
        continuations: Sequence[Sequence[Sequence[int]]],
        captures: Sequence[Capture | None] | None = None,
    ) -> list[list[Observation]]:
        """Forward each pending token, then its continuations as a tree, kept apart by the mask."""
        captures = captures if captures is not None else [None] * len(sequences)
        check_alternatives(sequences, continuations, captures, self.name, self.capture_refusal)
        trees = []
        for sequence, found in zip(sequences, continuations, strict=True):
            check_room(sequence, max(map(len, found)), self.context_limit)
            trees.append(Tree.of(sequence.token_ids[-1], sequence.num_cached, found))
        readings = [
            Reading(capture, row, queries)
            for row, (tree, capture) in enumerate(zip(trees, captures, strict=True))
            if capture is not None
            for queries in tree.places
        ]
        layout = self._open(sequences)
        first_column = layout.num_columns
        for sequence in sequences:
            sequence.version += 1  # the columns behind the sequence are about to be written
        width = max(len(tree.tokens) for tree in trees)
        inside = np.tile(np.eye(width, dtype=np.bool_), (len(trees), 1, 1))
        for row, tree in enumerate(trees):
            inside[row, : len(tree.tokens), : len(tree.tokens)] = tree.visible
        output = self._forward.run(
            layout,
            [tree.tokens for tree in trees],
            [tree.positions for tree in trees],
            inside,
            readings,
        )
        blocks = iter(output.blocks)
        observations: list[list[Observation]] = []
        for row, (sequence, tree) in enumerate(zip(sequences, trees, strict=True)):
            observations.append([])
            for token_ids, places in zip(continuations[row], tree.places, strict=True):
                logits = output.logits[row, self._forward.tensor(places)]
                logprobs, entropies = describe(logits, self._forward.tensor(list(token_ids)))
                columns = [first_column + place for place in places]
                observations[-1].append(
                    Observation(
                        token_logprobs=_numpy(logprobs),
                        token_entropies=_numpy(entropies),
                        num_greedy=count_leading(logits.argmax(-1).cpu().numpy(), token_ids),
                        blocks=None if captures[row] is None else next(blocks),
                        handle=Handle(sequence, sequence.version, layout.buffer, row, columns),
                    )
                )
        return observations

    @torch.inference_mode()
    def accept(
        self,
        sequences: Sequence[TorchSequence],
        candidates: Sequence[Candidate],
        sampling: Sampling,
        uniforms: FloatArray,
    ) -> list[Acceptance]:
        """Judge drafted tokens in one pass; keep the longest accepted run and what follows it."""
        inputs = []
        for sequence, candidate in zip(sequences, candidates, strict=True):
            if not isinstance(candidate.handle, Handle) or candidate.handle.distributions is None:
                raise ValueError("the candidate was proposed without keep_distributions")
            check_room(sequence, len(candidate.token_ids), self.context_limit)
            inputs.append([sequence.token_ids[-1], *candidate.token_ids])
        layout, output = self._read(sequences, inputs)
        first_column = layout.num_columns - output.logits.shape[1]
        acceptances = []
        for row, (sequence, candidate) in enumerate(zip(sequences, candidates, strict=True)):
            assert isinstance(candidate.handle, Handle)
            drafted = candidate.handle.distributions
            assert drafted is not None
            n = len(candidate.token_ids)
            logits = output.logits[row, : n + 1]
            num_accepted, token_ids = accept_tokens(
                warp(logits, sampling), drafted, candidate, uniforms[row]
            )
            has_room = len(sequence.token_ids) + len(token_ids) <= self.context_limit
            token_ids = token_ids if has_room else token_ids[:-1]
            logprobs, _ = describe(logits[: len(token_ids)], self._forward.tensor(token_ids))
            columns = list(range(first_column, first_column + len(token_ids)))
            self._keep_columns(sequence, layout.buffer, row, columns)
            sequence.append(token_ids)
            acceptances.append(Acceptance(num_accepted, tuple(token_ids), _numpy(logprobs)))
        return acceptances

    def rewind(self, sequence: TorchSequence, length: int) -> None:
        """Cut the sequence back; the KV behind it is overwritten by what comes next."""
        sequence.readable()
        check_length(sequence, length)
        sequence.truncate(length)

    def _open(self, sequences: Sequence[TorchSequence]) -> Layout:
        check_sequences(sequences)
        if len(sequences) == 1:
            return self._forward.layout([sequences[0].writable()], [sequences[0].num_cached])
        return self._forward.layout(
            [sequence.readable() for sequence in sequences],
            [sequence.num_cached for sequence in sequences],
        )

    def _read(
        self,
        sequences: Sequence[TorchSequence],
        inputs: list[list[int]],
        readings: Sequence[Reading] = (),
    ) -> tuple[Layout, PassOutput]:
        """One causal pass over given tokens."""
        layout = self._open(sequences)
        positions = []
        for sequence, tokens in zip(sequences, inputs, strict=True):
            sequence.version += 1
            positions.append(list(range(sequence.num_cached, sequence.num_cached + len(tokens))))
        return layout, self._forward.run(layout, inputs, positions, readings=readings)

    def _keep_columns(
        self, sequence: TorchSequence, buffer: KVBuffer, row: int, columns: list[int]
    ) -> None:
        """Make the columns the next ones of the sequence; they often lie there already."""
        own = sequence.writable()
        start = sequence.num_cached
        if own is buffer and columns == list(range(start, start + len(columns))):
            return
        own.copy_columns(start, buffer, row, self._forward.tensor(columns))


def _numpy(tensor: Tensor) -> FloatArray:
    array: FloatArray = tensor.float().cpu().numpy()
    return array

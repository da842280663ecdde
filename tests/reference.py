"""A model in plain NumPy: next-token logits are a function of the last two tokens.

It keeps no KV and computes everything anew, so it is slow and obviously right: the contract suite
runs over it first, and exact distributions can be enumerated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from specguard.core import (
    Acceptance,
    AttentionBlock,
    Boundary,
    Candidate,
    Capture,
    Observation,
    PieceTable,
    Prompt,
    Sampling,
    StepScanner,
)
from specguard.core.drafting import WholeDrafting
from specguard.core.model import FloatArray
from tests.rollout import block_of
from tests.scripted import CharTokenizer, FakeSequence


class CheckedSequence(FakeSequence):
    version = 0

    def fork(self) -> "CheckedSequence":
        self.check_open()
        return CheckedSequence(list(self.token_ids))

    def check_open(self) -> None:
        if self.is_closed:
            raise ValueError("the sequence is closed")


@dataclass
class Handle:
    sequence: CheckedSequence
    version: int
    distributions: FloatArray | None


def warp(logits: FloatArray, sampling: Sampling) -> FloatArray:
    """Probabilities [V] after temperature and top-p."""
    if sampling.is_greedy:
        return np.eye(len(logits))[logits.argmax()]
    probs = np.exp(logits / sampling.temperature - (logits / sampling.temperature).max())
    probs /= probs.sum()
    ordered = np.sort(probs)[::-1]
    count = int((np.cumsum(ordered) - ordered < sampling.top_p).sum())
    probs = np.where(probs < ordered[count - 1], 0.0, probs)
    return np.asarray(probs / probs.sum())


class ReferenceModel:
    capture_refusal = None
    context_limit = 512
    num_bytes_per_token = 1

    def __init__(self, seed: int, vocab_size: int = 128, num_layers: int = 4) -> None:
        rng = np.random.default_rng(seed)
        self.name = f"reference-{seed}"
        self.tokenizer = CharTokenizer()
        self.vocab_size, self.num_layers = vocab_size, num_layers
        self.first = rng.normal(scale=2.0, size=(vocab_size, vocab_size))
        self.second = rng.normal(scale=0.5, size=(vocab_size, vocab_size))

    def logits(self, token_ids: Sequence[int]) -> FloatArray:
        before = token_ids[-2] if len(token_ids) > 1 else 0
        return np.asarray(self.first[token_ids[-1]] + self.second[before])

    def start(self, prompt: Prompt, prefix: CheckedSequence | None = None) -> CheckedSequence:
        if prefix is not None:
            prefix.check_open()
            if tuple(prefix.token_ids) != prompt.token_ids[: len(prefix.token_ids)]:
                raise ValueError("the prompt begins otherwise")
        return CheckedSequence(list(prompt.token_ids))

    def propose(
        self,
        sequences: Sequence[CheckedSequence],
        num_candidates: int,
        sampling: Sampling,
        boundaries: Sequence[Boundary],
        uniforms: FloatArray,
        keep_distributions: bool = False,
    ) -> list[list[Candidate]]:
        if len(boundaries) != len(sequences):
            raise ValueError("sequences need a boundary each")
        most = max(boundary.max_tokens for boundary in boundaries)
        if uniforms.shape != (len(sequences), num_candidates, most):
            raise ValueError("uniforms have the wrong shape")
        proposed = []
        for sequence, rows, boundary in zip(sequences, uniforms, boundaries, strict=True):
            sequence.check_open()
            sequence.version += 1
            proposed.append(
                [
                    self._sample(sequence, sampling, boundary, row, keep_distributions)
                    for row in rows
                ]
            )
        return proposed

    def _sample(
        self,
        sequence: CheckedSequence,
        sampling: Sampling,
        boundary: Boundary,
        uniforms: FloatArray,
        keep: bool,
    ) -> Candidate:
        scanner = StepScanner(PieceTable(self.tokenizer), boundary)
        ids: list[int] = []
        distributions = []
        finish = None
        while finish is None:
            probs = warp(self.logits([*sequence.token_ids, *ids]), sampling)
            distributions.append(probs)
            below = np.cumsum(probs) <= uniforms[len(ids)] * (1 - 1e-9)
            ids.append(int(below.sum()))
            finish = scanner.feed(ids[-1])
        logprobs, entropies = self._describe(sequence.token_ids, ids)
        return Candidate(
            tuple(ids),
            self.tokenizer.decode(ids),
            logprobs,
            entropies,
            finish,
            np.bincount(ids, minlength=self.vocab_size).astype(float),
            Handle(sequence, sequence.version, np.array(distributions) if keep else None),
        )

    def _describe(
        self, context: Sequence[int], token_ids: Sequence[int]
    ) -> tuple[FloatArray, FloatArray]:
        logprobs, entropies = [], []
        for i, token_id in enumerate(token_ids):
            logits = self.logits([*context, *token_ids[:i]])
            logs = logits - np.logaddexp.reduce(logits)
            logprobs.append(logs[token_id])
            entropies.append(-(np.exp(logs) * logs).sum())
        return np.array(logprobs), np.array(entropies)

    def drafting(
        self, num_candidates: int, sampling: Sampling, keep_distributions: bool = False
    ) -> Any:
        return WholeDrafting(self, num_candidates, sampling, keep_distributions)

    def commit(self, sequences: Sequence[CheckedSequence], candidates: Sequence[Candidate]) -> None:
        for sequence, candidate in zip(sequences, candidates, strict=True):
            sequence.check_open()
            handle = candidate.handle
            assert isinstance(handle, Handle)
            if handle.sequence is not sequence or handle.version != sequence.version:
                raise ValueError("the candidate is stale or of another sequence")
            self._append(sequence, candidate.token_ids)

    def extend(
        self,
        sequences: Sequence[CheckedSequence],
        continuations: Sequence[Sequence[int]],
        captures: Sequence[Capture | None] | None = None,
        hidden_state: bool = False,
    ) -> list[Observation]:
        observations = []
        captures = captures or [None] * len(sequences)
        for sequence, ids, capture in zip(sequences, continuations, captures, strict=True):
            sequence.check_open()
            if not ids:
                raise ValueError("a continuation needs at least one token")
            blocks = self._blocks(sequence, len(ids), capture) if capture is not None else None
            described = self._describe(sequence.token_ids, ids)
            state = self.logits([*sequence.token_ids, *ids[:-1]]) if hidden_state else None
            num_greedy = 0
            for i, token_id in enumerate(ids):
                if token_id != self.logits([*sequence.token_ids, *ids[:i]]).argmax():
                    break
                num_greedy += 1
            observations.append(Observation(*described, blocks, state, num_greedy))
            self._append(sequence, ids)
        return observations

    def score(
        self,
        sequences: Sequence[CheckedSequence],
        continuations: Sequence[Sequence[Sequence[int]]],
        captures: Sequence[Capture | None] | None = None,
    ) -> list[list[Observation]]:
        captures = captures or [None] * len(sequences)
        observations = []
        for sequence, found, capture in zip(sequences, continuations, captures, strict=True):
            sequence.version += 1
            handle = Handle(sequence, sequence.version, None)
            if not found:
                raise ValueError("a sequence needs at least one continuation")
            observations.append(
                [
                    replace(self.extend([sequence.fork()], [ids], [capture])[0], handle=handle)
                    for ids in found
                ]
            )
        return observations

    def _blocks(
        self, sequence: CheckedSequence, n: int, capture: Capture
    ) -> tuple[AttentionBlock, ...]:
        if len(capture.is_source) != len(sequence.token_ids):
            raise ValueError("a capture must mark every context token as source or sink")
        width = len(capture.is_source) + n - 1
        weights = np.tril(1.0 / (1 + np.abs(np.subtract.outer(np.arange(width), np.arange(width)))))
        weights /= weights.sum(-1, keepdims=True)
        block = block_of(weights[np.newaxis], capture.is_source, n, capture.epsilon)
        return (block,) * capture.num_layers

    def accept(
        self,
        sequences: Sequence[CheckedSequence],
        candidates: Sequence[Candidate],
        sampling: Sampling,
        uniforms: FloatArray,
    ) -> list[Acceptance]:
        outcomes = []
        for sequence, candidate, row in zip(sequences, candidates, uniforms, strict=True):
            handle, n = candidate.handle, len(candidate.token_ids)
            assert isinstance(handle, Handle)
            if handle.distributions is None:
                raise ValueError("the candidate was proposed without keep_distributions")
            ids: list[int] = []
            rest = None
            for t, token_id in enumerate(candidate.token_ids):
                p = warp(self.logits([*sequence.token_ids, *ids]), sampling)
                q = handle.distributions[t]
                if row[t] * q[token_id] >= p[token_id]:
                    rest = np.maximum(p - q, 0)
                    break
                ids.append(token_id)
            num_accepted = len(ids)
            if rest is None and candidate.finish == "length":
                rest = warp(self.logits([*sequence.token_ids, *ids]), sampling)
            if rest is not None:
                ids.append(int((np.cumsum(rest) <= row[n] * rest.sum() * (1 - 1e-9)).sum()))
            logprobs, _ = self._describe(sequence.token_ids, ids)
            self._append(sequence, ids)
            outcomes.append(Acceptance(num_accepted, tuple(ids), logprobs))
        return outcomes

    def rewind(self, sequence: CheckedSequence, length: int) -> None:
        sequence.check_open()
        if not 1 <= length <= len(sequence.token_ids):
            raise ValueError(f"cannot rewind to {length}")
        del sequence.token_ids[length:]
        sequence.version += 1

    def _append(self, sequence: CheckedSequence, token_ids: Sequence[int]) -> None:
        sequence.token_ids.extend(token_ids)
        sequence.version += 1

"""A fake model for the loop: it proposes what a script says and records what it is asked."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from specguard.core import (
    Acceptance,
    AttentionBlock,
    Boundary,
    Candidate,
    Capture,
    Observation,
    Prompt,
    Sampling,
)
from specguard.core.drafting import WholeDrafting
from specguard.core.model import CandidateFinish, FloatArray

EOS = 0


class CharTokenizer:
    """One id a character; id 0 is EOS and has no text."""

    eos_ids = frozenset({EOS})

    def __init__(self, shift: int = 0) -> None:
        self.vocabulary = {chr(i): i + shift for i in range(1, 256)}

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(token_id) for token_id in token_ids if token_id != EOS)

    def encode_prompt(self, problem: str, system_prompt: str | None, thinking: bool) -> Prompt:
        head = [1, *self.encode(system_prompt or "")]
        ids = [*head, *self.encode(problem), 2]
        return Prompt(tuple(ids), (len(head), len(ids) - 1))


class FakeSequence:
    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids
        self.is_closed = False

    def fork(self) -> "FakeSequence":
        return FakeSequence(list(self.token_ids))

    def close(self) -> None:
        self.is_closed = True


@dataclass
class Scripted:
    """Proposes ``script`` step by step; text by text a log-prob and a source mass.

    An entry of the script is a list of texts (the candidates) or one text; "$" at a text's end is
    EOS. ``fail_at`` names a verb that raises.
    """

    name: str
    script: list[list[str] | str]
    logprobs: dict[str, float] = field(default_factory=dict)
    source_mass: dict[str, float] = field(default_factory=dict)
    context_limit: int = 4096
    num_bytes_per_token: int = 8
    capture_refusal: str | None = None
    tokenizer: CharTokenizer = field(default_factory=CharTokenizer)
    fail_at: str | None = None
    default_logprob: float = -0.1
    calls: list[tuple[object, ...]] = field(default_factory=list)
    sequences: list[FakeSequence] = field(default_factory=list)
    num_steps: int = 0

    def called(self, verb: str) -> list[tuple[object, ...]]:
        return [call for call in self.calls if call[0] == verb]

    def _log(self, verb: str, *rest: object) -> None:
        self.calls.append((verb, *rest))
        if verb == self.fail_at:
            raise RuntimeError(f"{verb} failed")

    def start(self, prompt: Prompt, prefix: FakeSequence | None = None) -> FakeSequence:
        self._log("start")
        self.sequences.append(FakeSequence(list(prompt.token_ids)))
        return self.sequences[-1]

    def propose(
        self,
        sequences: Sequence[FakeSequence],
        num_candidates: int,
        sampling: Sampling,
        boundaries: Sequence[Boundary],
        uniforms: FloatArray,
        keep_distributions: bool = False,
    ) -> list[list[Candidate]]:
        [boundary] = boundaries
        assert uniforms.shape == (len(sequences), num_candidates, boundary.max_tokens)
        self._log("propose", num_candidates, sampling, boundary.max_tokens)
        entry = self.script[min(self.num_steps, len(self.script) - 1)]
        self.num_steps += 1
        texts = entry if isinstance(entry, list) else [entry] * num_candidates
        assert len(texts) == num_candidates
        return [[self._candidate(text, boundary) for text in texts] for _ in sequences]

    def _candidate(self, text: str, boundary: Boundary) -> Candidate:
        finish: CandidateFinish = "delimiter"
        ids = self.tokenizer.encode(text.rstrip("$"))
        if text.endswith("$"):
            finish, ids = "eos", [*ids, EOS]
        elif not text.endswith(boundary.delimiter):
            finish = "length"
        if len(ids) > boundary.max_tokens:
            finish, ids = "length", ids[: boundary.max_tokens]
        return Candidate(
            token_ids=tuple(ids),
            text=self.tokenizer.decode(ids),
            token_logprobs=np.full(len(ids), self.logprobs.get(text, self.default_logprob)),
            token_entropies=np.full(len(ids), 0.5),
            finish=finish,
            embedding=np.bincount(np.array(ids) % 16, minlength=16).astype(float),
        )

    def drafting(
        self, num_candidates: int, sampling: Sampling, keep_distributions: bool = False
    ) -> Any:
        return WholeDrafting(self, num_candidates, sampling, keep_distributions)

    def commit(self, sequences: Sequence[FakeSequence], candidates: Sequence[Candidate]) -> None:
        self._log("commit", candidates[0].text)
        for sequence, candidate in zip(sequences, candidates, strict=True):
            sequence.token_ids.extend(candidate.token_ids)

    def extend(
        self,
        sequences: Sequence[FakeSequence],
        continuations: Sequence[Sequence[int]],
        captures: Sequence[Capture | None] | None = None,
        hidden_state: bool = False,
    ) -> list[Observation]:
        text = self.tokenizer.decode(continuations[0])
        capture = captures[0] if captures else None
        self._log("extend", text, capture)
        [sequence], [ids] = sequences, continuations
        observation = self._observe(sequence, ids, capture)
        sequence.token_ids.extend(ids)
        return [observation]

    def _observe(
        self, sequence: FakeSequence, ids: Sequence[int], capture: Capture | None
    ) -> Observation:
        text = self.tokenizer.decode(ids)
        if capture is not None:
            assert len(capture.is_source) == len(sequence.token_ids)
        n, mass = len(ids), self.source_mass.get(text, 1.0)
        block = AttentionBlock(np.full(n, mass), np.zeros(n), (1 - mass) * np.eye(n))
        return Observation(
            token_logprobs=np.full(n, self.logprobs.get(text, self.default_logprob)),
            token_entropies=np.full(n, 0.5),
            blocks=(block,) * capture.num_layers if capture is not None else None,
        )

    def score(
        self,
        sequences: Sequence[FakeSequence],
        continuations: Sequence[Sequence[Sequence[int]]],
        captures: Sequence[Capture | None] | None = None,
    ) -> list[list[Observation]]:
        self._log("score", [self.tokenizer.decode(ids) for ids in continuations[0]])
        return [
            [
                self._observe(sequence, ids, captures[row] if captures else None)
                for ids in continuations[row]
            ]
            for row, sequence in enumerate(sequences)
        ]

    def accept(
        self,
        sequences: Sequence[FakeSequence],
        candidates: Sequence[Candidate],
        sampling: Sampling,
        uniforms: FloatArray,
    ) -> list[Acceptance]:
        raise AssertionError("the step loop does not speculate on tokens")

    def rewind(self, sequence: FakeSequence, length: int) -> None:
        self._log("rewind", length)
        del sequence.token_ids[length:]

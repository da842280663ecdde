"""One problem's tokens and the two models' sequences that hold them.

Knows how a step comes about token by token; what becomes of a step is the loop's business.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from specguard.core.config import Author, SolveConfig, VerifierConfig
from specguard.core.grounding import source_mask
from specguard.core.model import (
    Boundary,
    Candidate,
    CandidateFinish,
    Capture,
    LanguageModel,
    Observation,
    Prompt,
    Sampling,
    TokenSequence,
)
from specguard.core.randomness import Purpose, uniforms
from specguard.core.requests import Accept, Extend, Propose, Score, Start, Work
from specguard.core.text import PieceTable, StepScanner


@dataclass(frozen=True, slots=True)
class Written:
    """A step as it stands.

    Of ``num_guessed`` tokens that the draft guessed it keeps ``num_kept``; ``num_reused`` tokens at
    its beginning are of a candidate that the target has read.
    """

    step: Candidate
    num_guessed: int = 0
    num_kept: int = 0
    num_reused: int = 0
    is_finished: bool = True

    @classmethod
    def beginning(cls, candidate: Candidate, seen: Observation) -> "Written":
        """The first tokens of a candidate, as far as they are the reading model's own choice."""
        n = seen.num_greedy
        step = replace(
            candidate,
            token_ids=candidate.token_ids[:n],
            token_logprobs=seen.token_logprobs[:n],
            token_entropies=seen.token_entropies[:n],
        )
        return cls(step, num_reused=n, is_finished=n == len(candidate.token_ids))


class Writer:
    """The tokens so far, and a sequence per model that holds them or a beginning of them.

    A sequence is opened when its model is first needed, and catches up in one pass on what the
    other model wrote: a verifying draft keeps the target out until a step is rejected.
    """

    def __init__(
        self,
        models: Mapping[Author, LanguageModel[Any]],
        prompt: Prompt,
        key: int,
        config: SolveConfig,
    ) -> None:
        self.models = models
        self.prompt = prompt
        self.token_ids = list(prompt.token_ids)
        self.num_verified_tokens = 0  # that the target read in parallel
        self.step = 0  # its number is part of what its randomness is keyed by
        self._key = key
        self._config = config
        self._sequences: dict[Author, TokenSequence] = {}
        self._fork: TokenSequence | None = None  # of the draft's, behind further candidates
        self._forked: list[Candidate] = []
        lead = models.get("target") or models["draft"]
        self.tokenizer = lead.tokenizer
        self.pieces = PieceTable(lead.tokenizer)
        self.context_limit = min(model.context_limit for model in models.values())

    @property
    def room(self) -> int:
        """Tokens that may still be written."""
        written = len(self.token_ids) - len(self.prompt.token_ids)
        return min(self._config.max_tokens - written, self.context_limit - len(self.token_ids))

    def propose(
        self,
        author: Author,
        num_candidates: int,
        sampling: Sampling,
        written: tuple[int, ...] = (),
    ) -> Work[list[Candidate]]:
        """Candidates of one model for the next step, or for the rest of one that is begun.

        ``written`` are the tokens of the step that stand already.
        """
        self._drop_fork()
        sequence = yield from self._caught_up(author)
        numbers = range(num_candidates)
        proposal = self._proposal(author, sequence, numbers, sampling, written)
        candidates: list[Candidate] = yield proposal
        return candidates

    def propose_more(
        self, candidates: list[Candidate], num_candidates: int, sampling: Sampling
    ) -> Work[list[Candidate]]:
        """The draft's candidates for the same step up to ``num_candidates``, all of them.

        They are those that `propose` would have given at once.
        """
        # A second proposal on the sequence would overwrite the first one's columns.
        self._fork = self._sequences["draft"].fork()
        numbers = range(len(candidates), num_candidates)
        self._forked = yield self._proposal("draft", self._fork, numbers, sampling)
        return candidates + self._forked

    def _proposal(
        self,
        author: Author,
        sequence: TokenSequence,
        numbers: range,
        sampling: Sampling,
        written: tuple[int, ...] = (),
    ) -> Propose:
        boundary = self._boundary(written)
        purpose = Purpose.DRAFT if author == "draft" else Purpose.TARGET
        draws = self._draws(purpose, numbers.stop, boundary.max_tokens)[numbers.start :]
        return Propose(
            model=self.models[author],
            sequence=sequence,
            num_candidates=len(numbers),
            sampling=sampling,
            boundary=boundary,
            uniforms=draws,
        )

    def read(
        self, author: Author, token_ids: tuple[int, ...], capture: Capture | None
    ) -> Work[Observation]:
        """One model reads a step and holds it from then on, unless it is taken back."""
        sequence = yield from self._caught_up(author)
        if author == "target":
            self.num_verified_tokens += len(token_ids)
        observation: Observation = yield Extend(
            model=self.models[author], sequence=sequence, token_ids=token_ids, capture=capture
        )
        return observation

    def score(
        self, candidates: list[Candidate], capture: Capture | None
    ) -> Work[list[Observation]]:
        """The target reads several steps side by side and holds none of them."""
        sequence = yield from self._caught_up("target")
        continuations = [candidate.token_ids for candidate in candidates]
        self.num_verified_tokens += sum(map(len, continuations))
        observations: list[Observation] = yield Score(
            model=self.models["target"],
            sequence=sequence,
            continuations=continuations,
            capture=capture,
        )
        return observations

    def capture(self, verifier: VerifierConfig) -> Capture | None:
        """What the verifying model is to read of its attention, None where it cannot or need not.

        Attention that weighs nothing is read for the sake of a detailed record only.
        """
        if not verifier.needs_attention and not self._config.detail:
            return None
        if self.models[verifier.model].capture_refusal is not None:
            return None
        is_source = source_mask(self.prompt, len(self.token_ids), verifier.sources)
        return Capture(is_source, verifier.num_layers, verifier.epsilon)

    def commit(self, author: Author, candidate: Candidate) -> None:
        """A model holds what it proposed or scored."""
        if author == "draft" and any(candidate is other for other in self._forked):
            assert self._fork is not None
            self._sequences["draft"], self._fork = self._fork, self._sequences["draft"]
        self.models[author].commit([self._sequences[author]], [candidate])

    def take_back(self, author: Author) -> None:
        """A model forgets what it read beyond the tokens so far."""
        self.models[author].rewind(self._sequences[author], len(self.token_ids))

    def append(self, token_ids: tuple[int, ...]) -> None:
        """Make tokens part of the text; a model that does not hold them reads them when needed."""
        self.token_ids.extend(token_ids)

    def speculate(self, sampling: Sampling, written: tuple[int, ...] = ()) -> Work[Written]:
        """Write the target's next step or the rest of it, the draft guessing a few tokens ahead.

        The step is distributed as if the target had drawn it token by token (Leviathan et al. 2023,
        theorem 3.5); it is part of the text already, and the target holds it.
        """
        draft, target = self.models["draft"], self.models["target"]
        boundary = self._boundary(written)
        scanner = StepScanner(self.pieces, boundary)
        size = boundary.max_tokens + 1
        guessing, judging, correcting = (
            self._draws(purpose, 1, size)[0]
            for purpose in (Purpose.DRAFT, Purpose.ACCEPT, Purpose.TARGET)
        )
        token_ids: list[int] = []
        logprobs: list[float] = []
        num_guessed = num_kept = 0
        finish: CandidateFinish | None = None
        for block in range(size):  # each one writes a token at least
            first = len(token_ids)
            cap = min(self._config.num_speculated, boundary.max_tokens - first)
            limits = Boundary(boundary.delimiter, boundary.eos_ids, cap)
            guesser = yield from self._caught_up("draft")
            judge = yield from self._caught_up("target")
            [guess] = yield Propose(
                model=draft,
                sequence=guesser,
                num_candidates=1,
                sampling=sampling,
                boundary=limits,
                uniforms=guessing[np.newaxis, first : first + cap],
                keep_distributions=True,
            )
            n = len(guess.token_ids)
            outcome = yield Accept(
                model=target,
                sequence=judge,
                candidate=guess,
                sampling=sampling,
                uniforms=np.append(judging[first : first + n], correcting[block]),
            )
            self.num_verified_tokens += n
            num_guessed += n
            before = len(self.token_ids)
            for token_id, logprob in zip(outcome.token_ids, outcome.token_logprobs, strict=True):
                token_ids.append(token_id)
                logprobs.append(float(logprob))
                finish = scanner.feed(token_id)
                if finish is not None:
                    break
            self.token_ids.extend(token_ids[first:])
            kept = min(outcome.num_accepted, len(token_ids) - first)
            num_kept += kept
            draft.commit([guesser], [guess])
            draft.rewind(guesser, before + kept)
            if finish is not None:
                break
        self.take_back("target")
        assert finish is not None
        step = Candidate(
            token_ids=tuple(token_ids),
            text=self.tokenizer.decode(token_ids),
            token_logprobs=np.array(logprobs),
            token_entropies=np.full(len(token_ids), np.nan),
            finish=finish,
            embedding=np.zeros(1),
        )
        return Written(step, num_guessed, num_kept)

    def joined(self, begun: Written, rest: Written) -> Written:
        """A step of which two parts were written."""
        first, second = begun.step, rest.step
        token_ids = first.token_ids + second.token_ids
        step = replace(
            second,
            token_ids=token_ids,
            text=self.tokenizer.decode(token_ids),
            token_logprobs=np.concatenate([first.token_logprobs, second.token_logprobs]),
            token_entropies=np.concatenate([first.token_entropies, second.token_entropies]),
        )
        return replace(rest, step=step, num_reused=begun.num_reused)

    def close(self) -> None:
        """Close every sequence."""
        self._drop_fork()
        for sequence in self._sequences.values():
            sequence.close()

    def _drop_fork(self) -> None:
        if self._fork is not None:
            self._fork.close()
        self._fork, self._forked = None, []

    def _boundary(self, written: tuple[int, ...] = ()) -> Boundary:
        cap = min(self._config.max_step_tokens - len(written), self.room)
        return Boundary(self._config.delimiter, self.tokenizer.eos_ids, cap, written)

    def _draws(self, purpose: Purpose, num_candidates: int, count: int) -> Any:
        return uniforms(self._config.seed, self._key, purpose, self.step, num_candidates, count)

    def _caught_up(self, author: Author) -> Work[TokenSequence]:
        """The model's sequence with every token so far in it."""
        model = self.models[author]
        if author not in self._sequences:
            self._sequences[author] = yield Start(model=model, prompt=self.prompt)
        sequence = self._sequences[author]
        unseen = self.token_ids[len(sequence.token_ids) :]
        if unseen:
            yield Extend(model=model, sequence=sequence, token_ids=unseen)
            if author == "target":
                self.num_verified_tokens += len(unseen)
        return sequence

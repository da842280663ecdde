"""What a solution leaves behind while it is made: its records, its text, the clock, its end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from specguard.core.config import Author, SolveConfig
from specguard.core.model import Candidate, Observation
from specguard.core.records import (
    CandidateRecord,
    Decision,
    FinishReason,
    Phase,
    Solution,
    StepRecord,
    TokenArrays,
    summarise,
)
from specguard.core.requests import T, Work
from specguard.core.selector import Selection
from specguard.core.text import final_answer, is_looping
from specguard.core.verifier import Verdict
from specguard.core.writing import Writer, Written

MAX_LOOP_PERIOD, NUM_LOOP_ROUNDS = 4, 3  # steps: the same four or fewer, three times over
MAX_TOKEN_PERIOD, NUM_TOKEN_ROUNDS = 16, 8  # tokens within one step that hit its cap


@dataclass(slots=True)
class Drafted:
    """The step in hand: its candidates and all that is known of them.

    ``scored`` are verdicts, by index, of candidates that no sequence has taken in; ``seen`` what
    the target has read, and what it saw; ``observation`` is of the selected candidate.
    """

    candidates: list[Candidate]
    num_spared: int = 0
    selection: Selection | None = None
    verdict: Verdict | None = None
    scored: dict[int, Verdict] = field(default_factory=dict)
    seen: list[tuple[Candidate, Observation]] = field(default_factory=list)
    observation: Observation | None = None

    @property
    def selected(self) -> Candidate:
        """The candidate that was selected."""
        assert self.selection is not None
        return self.candidates[self.selection.index]

    @property
    def similarity(self) -> float:
        """Of the selected candidate to the others."""
        assert self.selection is not None
        return self.selection.similarities[self.selection.index]


class Ledger:
    """Keeps the books of one problem."""

    def __init__(self, problem: str, writer: Writer, config: SolveConfig) -> None:
        self._problem, self._writer, self._config = problem, writer, config
        self.steps: list[StepRecord] = []
        self.finish_reason: FinishReason | None = None
        self._text = ""
        self._cut_ids: list[int] = []  # tokens since the last step that ended by itself
        self._cut_text = ""
        self._seconds: dict[Phase, float] = {}
        self._started = time.perf_counter()

    # The clock.

    def timed(self, phase: Phase, work: Work[T]) -> Work[T]:
        """Do the work on this phase's account: its own time, and its share of the calls."""
        result = None
        while True:
            try:
                with self.phase(phase):
                    request = work.send(result)
            except StopIteration as stop:
                found: T = stop.value
                return found
            result = yield request
            self._seconds[phase] += request.seconds

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Time that is spent in a phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self._seconds[phase] = self._seconds.get(phase, 0.0) + spent

    # Records.

    def record(
        self,
        decision: Decision,
        author: Author,
        written: Written,
        drafted: Drafted | None = None,
        is_fallback: bool = False,
    ) -> StepRecord:
        """Close the step: its record, and whether the solution ends with it."""
        verdict = drafted.verdict if drafted is not None else None
        candidates = drafted.candidates if drafted is not None else []
        text = self._text_of(written.step)
        step = StepRecord(
            index=len(self.steps),
            text=text,
            author=author,
            decision=decision,
            num_tokens=len(written.step.token_ids),
            num_drafted=sum(len(candidate.token_ids) for candidate in candidates),
            signals=dict(verdict.signals) if verdict else {},
            scores=dict(verdict.scores) if verdict else {},
            threshold=self._threshold if verdict else None,
            seconds=self._seconds,
            draft_text=drafted.selected.text if drafted and decision == "rewritten" else None,
            selected=drafted.selection.index if drafted and drafted.selection else None,
            candidates=self._candidate_records(drafted),
            tokens=self._token_arrays(written.step, drafted),
            num_guessed=written.num_guessed,
            num_kept=written.num_kept,
            num_reused=written.num_reused,
            is_fallback=is_fallback,
            num_spared=drafted.num_spared if drafted else 0,
        )
        self._seconds = {}
        self.steps.append(step)
        self._writer.step = len(self.steps)
        self._text += text
        self.finish_reason = self._finish_reason(written.step)
        return step

    def solution(self) -> Solution:
        """The finished solution."""
        assert self.finish_reason is not None
        names = {author: model.name for author, model in self._writer.models.items()}
        return Solution(
            problem=self._problem,
            answer=final_answer(self._text),
            text=self._text,
            finish_reason=self.finish_reason,
            steps=tuple(self.steps),
            stats=summarise(
                self.steps,
                time.perf_counter() - self._started,
                len(self._writer.prompt.token_ids),
                self._writer.num_verified_tokens,
            ),
            config=self._config,
            draft=names.get("draft"),
            target=names.get("target"),
            is_calibrated=self._config.verifier.is_calibrated,
        )

    @property
    def _threshold(self) -> float:
        is_rsd = self._config.method == "rsd"
        return self._config.reward_threshold if is_rsd else self._config.verifier.threshold

    def _text_of(self, written: Candidate) -> str:
        """The step's text; after a cut it is read on from there, a character may span the two."""
        self._cut_ids.extend(written.token_ids)
        text = self._writer.tokenizer.decode(self._cut_ids)
        is_cut = written.finish == "length"
        if is_cut:
            text = text.rstrip("\ufffd")
        new, self._cut_text = text[len(self._cut_text) :], text
        if not is_cut:
            self._cut_ids, self._cut_text = [], ""
        return new

    def _candidate_records(self, drafted: Drafted | None) -> tuple[CandidateRecord, ...] | None:
        if not self._config.detail or drafted is None or drafted.selection is None:
            return None
        scores = {
            drafted.candidates[index].token_ids: verdict.scores["ensemble"]
            for index, verdict in drafted.scored.items()
        }
        similarities = drafted.selection.similarities
        return tuple(
            CandidateRecord(
                text=candidate.text,
                token_ids=candidate.token_ids,
                token_logprobs=tuple(candidate.token_logprobs.tolist()),
                similarity=similarity,
                finish=candidate.finish,
                score=scores.get(candidate.token_ids),
            )
            for candidate, similarity in zip(drafted.candidates, similarities, strict=True)
        )

    def _token_arrays(self, written: Candidate, drafted: Drafted | None) -> TokenArrays | None:
        verdict = drafted.verdict if drafted is not None else None
        if not self._config.detail or (verdict is None and self._config.method == "sd"):
            return None
        shown = drafted.selected if drafted is not None and drafted.selection else written
        seen = (drafted.observation if drafted is not None else None) or shown
        grounding = verdict.token_grounding if verdict else None
        return TokenArrays(
            token_ids=shown.token_ids,
            pieces=tuple(map(self._writer.pieces, shown.token_ids)),
            logprobs=tuple(seen.token_logprobs.tolist()),
            entropies=tuple(seen.token_entropies.tolist()),
            grounding=None if grounding is None else tuple(grounding.tolist()),
        )

    def _finish_reason(self, written: Candidate) -> FinishReason | None:
        if final_answer(self._text) is not None:
            return "answer"
        if written.finish == "eos":
            return "eos"
        tail = [step.text.strip() for step in self.steps[-MAX_LOOP_PERIOD * NUM_LOOP_ROUNDS :]]
        if is_looping(tail, MAX_LOOP_PERIOD, NUM_LOOP_ROUNDS) or (
            written.finish == "length"
            and is_looping(written.token_ids, MAX_TOKEN_PERIOD, NUM_TOKEN_ROUNDS)
        ):
            return "repetition"
        if self._writer.room < 1 or len(self.steps) >= self._config.max_steps:
            return "length"
        return None

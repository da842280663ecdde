"""What a solution leaves behind while it is made: its records, its text, the clock, its end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from specguard.core.config import Author
from specguard.core.context import ProblemContext
from specguard.core.records import (
    AnswerSource,
    CandidateRecord,
    Decision,
    FinishReason,
    Phase,
    Solution,
    StepRecord,
    TokenArrays,
    summarise,
)
from specguard.core.step import StepState, WrittenStep
from specguard.core.text import (
    final_answer,
    last_paragraph,
    loop_length,
    opens_code_block,
)

MAX_LOOP_PERIOD, NUM_LOOP_ROUNDS = 4, 3  # steps: the same four or fewer, three times over
# Thinking says "Wait," and checks again and again; its loops are of any length. Whatever it says
# this often, and with so many tokens in all, leads nowhere.
MAX_THINKING_PERIOD, NUM_THINKING_ROUNDS, NUM_THINKING_TOKENS = 64, 4, 256
MAX_TOKEN_PERIOD, NUM_TOKEN_ROUNDS = 16, 8  # tokens within one step that hit its cap


class Recorder:
    """Keeps the records of one problem; ``finish_reason`` is there once it is over."""

    def __init__(self, problem: str, context: ProblemContext) -> None:
        self._problem, self._context, self._config = problem, context, context.config
        self.steps: list[StepRecord] = []
        self.finish_reason: FinishReason | None = None
        self._text = ""
        self._texts: list[str] = []  # of the steps, without the blanks around them
        self._cut_ids: list[int] = []  # tokens since the last step that ended by itself
        self._cut_text = ""
        self._seconds: dict[Phase, float] = {}
        self._started: float | None = None  # with the first phase
        self._total = 0.0

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Wall time that is spent in a phase; among others, a problem waits for them, too."""
        started = time.perf_counter()
        if self._started is None:
            self._started = started
        self._context.announcer.phase(phase)
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self._seconds[phase] = self._seconds.get(phase, 0.0) + spent

    def record(
        self,
        decision: Decision,
        author: Author,
        written: WrittenStep,
        step: StepState | None = None,
        is_fallback: bool = False,
    ) -> StepRecord:
        """Close the step: its record, and whether the solution ends with it."""
        verdict = step.verdict if step is not None else None
        candidates = step.candidates if step is not None else []
        text = self._text_of(written)
        made = StepRecord(
            index=len(self.steps),
            text=text,
            author=author,
            decision=decision,
            num_tokens=len(written.token_ids),
            num_drafted=sum(len(candidate.token_ids) for candidate in candidates),
            signals=dict(verdict.signals) if verdict else {},
            scores=dict(verdict.scores) if verdict else {},
            threshold=self._threshold if verdict else None,
            seconds=self._seconds,
            draft_text=(step.selected.text if step and decision == "rewritten" else None),
            selected=step.selection.index if step and step.selection else None,
            candidates=self._candidate_records(step),
            tokens=self._token_arrays(written, step),
            num_guessed=written.num_guessed,
            num_kept=written.num_kept,
            num_reused=written.num_reused,
            is_fallback=is_fallback,
            num_spared=step.num_spared if step else 0,
            is_given_up=step is not None and step.is_given_up,
        )
        self._seconds = {}
        self.steps.append(made)
        self._context.step = len(self.steps)
        self._context.is_in_code = opens_code_block(text, self._context.is_in_code)
        self._context.announcer.begin_step(len(self.steps), self._cut_ids)
        self._text += text
        self._texts.append(text.strip())
        self.finish_reason = self._finish_reason(written)
        if self._started is not None:
            self._total = time.perf_counter() - self._started
        return made

    def solution(self) -> Solution:
        """The finished solution."""
        assert self.finish_reason is not None
        context = self._context
        names = {author: engine.name for author, engine in context.engines.items()}
        answer, answer_source = self._answer()
        return Solution(
            problem=self._problem,
            answer=answer,
            answer_source=answer_source,
            text=self._text,
            finish_reason=self.finish_reason,
            steps=tuple(self.steps),
            stats=summarise(
                self.steps,
                self._total,
                len(context.prompt.token_ids),
                context.num_verified_tokens,
            ),
            config=self._config,
            draft=names.get("draft"),
            target=names.get("target"),
            is_calibrated=self._config.verifier.is_calibrated,
            is_reproducible=all(
                "exact randomness" in engine.features for engine in context.engines.values()
            ),
        )

    @property
    def _threshold(self) -> float:
        is_rsd = self._config.method == "rsd"
        return self._config.reward_threshold if is_rsd else self._config.verifier.threshold

    def _answer(self) -> tuple[str | None, AnswerSource | None]:
        """What is boxed, or else what the model ended with, if it came to an end."""
        said = self._context.said(self._text) or ""
        boxed = final_answer(said)
        if boxed is not None:
            return boxed, "box"
        ending = last_paragraph(said) if self.finish_reason == "eos" else None
        return ending, None if ending is None else "text"

    def _text_of(self, written: WrittenStep) -> str:
        """The step's text; after a cut it is read on from there, a character may span the two."""
        self._cut_ids.extend(written.token_ids)
        text = self._context.tokenizer.decode(self._cut_ids)
        is_cut = written.finish == "length"
        if is_cut:
            text = text.rstrip("\ufffd")
        new, self._cut_text = text[len(self._cut_text) :], text
        if not is_cut:
            self._cut_ids, self._cut_text = [], ""
        return new

    def _candidate_records(self, step: StepState | None) -> tuple[CandidateRecord, ...] | None:
        if not self._config.detail or step is None or step.selection is None:
            return None
        scores = {
            step.candidates[index].token_ids: verdict.scores["ensemble"]
            for index, verdict in step.verdicts.items()
        }
        return tuple(
            CandidateRecord(
                text=candidate.text,
                token_ids=candidate.token_ids,
                token_logprobs=tuple(candidate.token_logprobs.tolist()),
                similarity=similarity,
                finish=candidate.finish,
                score=scores.get(candidate.token_ids),
            )
            for candidate, similarity in zip(
                step.candidates, step.selection.similarities, strict=True
            )
        )

    def _token_arrays(self, written: WrittenStep, step: StepState | None) -> TokenArrays | None:
        verdict = step.verdict if step is not None else None
        shown = step.selected if step is not None and step.selection else written
        seen = (step.observation if step is not None else None) or shown
        if not self._config.detail or seen.token_logprobs is None:
            return None
        grounding = verdict.token_grounding if verdict else None
        entropies = seen.token_entropies
        return TokenArrays(
            token_ids=shown.token_ids,
            pieces=tuple(map(self._context.pieces, shown.token_ids)),
            logprobs=tuple(seen.token_logprobs.tolist()),
            entropies=None if entropies is None else tuple(entropies.tolist()),
            grounding=None if grounding is None else tuple(grounding.tolist()),
        )

    def _finish_reason(self, written: WrittenStep) -> FinishReason | None:
        said = self._context.said(self._text)
        if said is not None and final_answer(said) is not None:
            return "answer"
        if written.finish == "eos":
            return "eos"
        if self._is_looping(written, is_thinking=said is None):
            return "repetition"
        max_steps = self._config.max_steps
        if self._context.room < 1 or (max_steps is not None and len(self.steps) >= max_steps):
            return "length"
        return None

    def _is_looping(self, written: WrittenStep, is_thinking: bool) -> bool:
        """Whether the text goes round in circles, by its last steps or within one without end."""
        token_ids = written.token_ids
        if written.finish == "length":
            length = loop_length(token_ids, MAX_TOKEN_PERIOD, NUM_TOKEN_ROUNDS)
            # A row of equal digits is none yet, where a model thinks aloud.
            if length > (len(token_ids) // 2 if is_thinking else 0):
                return True
        if not is_thinking:
            return loop_length(self._texts, MAX_LOOP_PERIOD, NUM_LOOP_ROUNDS) > 0
        length = loop_length(self._texts, MAX_THINKING_PERIOD, NUM_THINKING_ROUNDS)
        num_tokens = sum(step.num_tokens for step in self.steps[len(self.steps) - length :])
        return num_tokens >= NUM_THINKING_TOKENS

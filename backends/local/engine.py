"""An engine in this process: the driver of a model that a layer of tensors computes.

Serves any number of problems; their jobs share passes. May be used from several threads and event
loops, which take turns.
"""

from collections.abc import Hashable, Sequence
from threading import RLock

import numpy as np

from specguard.backends.local.batcher import batcher
from specguard.backends.local.drawing import Drawing, DrawnJob, not_finite
from specguard.backends.local.kept import KeptSequence, common_length
from specguard.backends.local.layer import TensorLayer
from specguard.backends.local.scoring import score_together
from specguard.core.engine import (
    ALL_FEATURES,
    Candidate,
    Capture,
    Feature,
    GenerateJob,
    Observation,
    ScoreJob,
    Tokenizer,
)
from specguard.core.errors import SpecguardError, UsageError
from specguard.core.text import PieceTable

_SHORTEST_BEGINNING = 8  # tokens; a shorter one costs less to read than to copy


class LocalEngine:
    """An `Engine` over a tensor layer. Make one with a backend's ``load``.

    ``attention_refusal`` says why attention cannot be captured, ``randomness_refusal`` why others
    may draw otherwise by the same uniforms; ``note`` is something that the user should know of how
    the model is run.
    """

    def __init__(
        self,
        name: str,
        layer: TensorLayer,
        tokenizer: Tokenizer,
        context_limit: int,
        attention_refusal: str | None = None,
        note: str = "",
        randomness_refusal: str | None = None,
    ) -> None:
        self.name, self.tokenizer, self.context_limit = name, tokenizer, context_limit
        self.layer = layer
        self.note = note
        self.reasons: dict[Feature, str] = {}
        if attention_refusal is not None:
            self.reasons["attention"] = attention_refusal
        if randomness_refusal is not None:
            self.reasons["exact randomness"] = randomness_refusal
        self.features = ALL_FEATURES - self.reasons.keys()
        self._pieces = PieceTable(tokenizer)
        self._kept: dict[Hashable, KeptSequence] = {}
        self._lock = RLock()

    @property
    def num_bytes_per_token(self) -> int:
        """What one token's keys and values take."""
        return self.layer.num_bytes_per_token

    @property
    def num_kept(self) -> int:
        """Problems of which something is kept."""
        return len(self._kept)

    async def generate(self, job: GenerateJob) -> list[Candidate]:
        """Sample steps, beside those of other problems."""
        self._check(job.prefix, job.boundary.max_tokens)
        if job.uniforms is None:
            raise ValueError("this engine draws by uniforms: the job needs them")
        candidates: list[Candidate] = await batcher().run(self, job)
        return candidates

    async def score(self, job: ScoreJob) -> list[Observation]:
        """Observe continuations, beside those of other problems."""
        self._check(job.prefix, max(map(len, job.continuations)))
        if job.capture is not None:
            self._check_capture(job.capture)
        observations: list[Observation] = await batcher().run(self, job)
        return observations

    def release(self, key: Hashable) -> None:
        """Let go of what is kept of a problem."""
        self._kept.pop(key, None)

    # What the batcher asks for.

    def kind(self, job: GenerateJob) -> Hashable:
        """Jobs of one kind may share a drawing."""
        return id(self), job.sampling, job.hidden_states, job.distributions

    def new_drawing(self, job: GenerateJob) -> Drawing:
        """A drawing for jobs of this kind."""
        wants = job.hidden_states, job.distributions
        return Drawing(self.layer, self._pieces, job.sampling, wants)

    def join(self, drawing: Drawing, job: GenerateJob) -> DrawnJob:
        """A job takes part from the next pass on."""
        with self._lock, self.layer.computing(self.name):
            kept = self._sequence(job)
            kept.is_busy = True
            return drawing.add(job, kept)

    def drop(self, drawing: Drawing, state: DrawnJob) -> None:
        """A job takes part no longer."""
        with self._lock:
            drawing.drop(state)
            state.kept.is_busy = False

    def advance(self, drawing: Drawing) -> list[tuple[DrawnJob, list[Candidate] | SpecguardError]]:
        """One pass, and what has become of the jobs that are done with it."""
        found: list[tuple[DrawnJob, list[Candidate] | SpecguardError]] = []
        with self._lock, self.layer.computing(self.name):
            for state in drawing.advance():
                state.kept.is_busy = False
                try:
                    decode = self.tokenizer.decode
                    found.append((state, drawing.candidates(state, self.name, decode)))
                except SpecguardError as error:
                    self.release(state.job.key)  # what is no number spoils columns before it, too
                    found.append((state, error))
            if found:
                self.layer.synchronize()
        return found

    def score_now(self, jobs: Sequence[ScoreJob]) -> list[list[Observation]]:
        """All jobs in one pass."""
        taken: list[tuple[ScoreJob, KeptSequence]] = []
        with self._lock, self.layer.computing(self.name):
            try:
                for job in jobs:
                    taken.append((job, self._sequence(job)))
                    taken[-1][1].is_busy = True
                found = score_together(self.layer, taken)
            finally:
                for _, kept in taken:
                    kept.is_busy = False
            self.layer.synchronize()
        if any(np.isnan(seen.token_logprobs).any() for observed in found for seen in observed):
            raise not_finite(self.name)
        return found

    def do_now(self, job: GenerateJob | ScoreJob) -> list[Candidate] | list[Observation]:
        """One job, from the beginning to its end, with nothing kept from before."""
        self.release(job.key)
        try:
            if isinstance(job, ScoreJob):
                return self.score_now([job])[0]
            drawing = self.new_drawing(job)
            self.join(drawing, job)
            while not (done := self.advance(drawing)):
                pass
        except Exception:
            self.release(job.key)
            raise
        [(_, result)] = done
        if isinstance(result, SpecguardError):
            raise result
        return result

    def _check(self, prefix: tuple[int, ...], num_new: int) -> None:
        wanted = len(prefix) + num_new
        if wanted > self.context_limit:
            raise SpecguardError(
                f"{wanted} tokens do not fit the context window of {self.context_limit}",
                "shorten the problem or choose a model with a longer context",
            )

    def _check_capture(self, capture: Capture) -> None:
        if "attention" in self.reasons:
            raise SpecguardError(
                f"the attention of {self.name} cannot be captured: {self.reasons['attention']}",
                "verify by log-probability alone: --beta 1",
            )
        if capture.num_layers > self.layer.num_layers:
            raise UsageError(
                f"attention of {capture.num_layers} layers is asked for and {self.name} has "
                f"{self.layer.num_layers}"
            )

    def _sequence(self, job: GenerateJob | ScoreJob) -> KeptSequence:
        """What is kept of the job's problem; a new one begins with what others have in common."""
        kept = self._kept.get(job.key)
        if kept is not None and not kept.is_busy:
            return kept
        new = KeptSequence(self.layer.new_buffer())
        self._begin(new, job.prefix)
        if kept is None:
            self._kept[job.key] = new  # else another job of the problem is under way
        return new

    def _begin(self, kept: KeptSequence, prefix: tuple[int, ...]) -> None:
        lengths = {
            common_length(other.token_ids, prefix): other for other in list(self._kept.values())
        }
        length = max(lengths, default=0)
        if length >= _SHORTEST_BEGINNING:
            kept.buffer.copy_from(lengths[length].buffer, length)
            kept.hold(prefix[:length])

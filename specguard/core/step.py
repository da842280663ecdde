"""The step in hand: what was proposed and what is known of it, and a step as it is written."""

from dataclasses import dataclass, field

from specguard.core.engine import Candidate, CandidateFinish, FloatArray, Observation
from specguard.core.selector import Selection
from specguard.core.verifier import Verdict


@dataclass(slots=True)
class StepState:
    """Candidates of the next step and all that is known of them.

    ``num_spared`` candidates were not drawn. ``verdicts`` are by index, of candidates that the
    target has scored to select; ``readings`` what the target has read, and what it saw there;
    ``observation`` is of the selected candidate. One that was read while it was drafted has had
    ``num_passes`` of the target; it ``is_given_up`` where no end could have saved it.
    """

    candidates: list[Candidate]
    num_spared: int = 0
    selection: Selection | None = None
    verdict: Verdict | None = None
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    readings: list[tuple[Candidate, Observation]] = field(default_factory=list)
    observation: Observation | None = None
    num_passes: int = 1
    is_given_up: bool = False

    @property
    def selected(self) -> Candidate:
        """The candidate that was selected."""
        assert self.selection is not None
        return self.candidates[self.selection.index]

    @property
    def verified(self) -> list[Candidate]:
        """The candidates that were judged: what the target has read of them, or the selected."""
        return [candidate for candidate, _ in self.readings] or [self.selected]

    @property
    def similarity(self) -> float:
        """Of the selected candidate to the others."""
        assert self.selection is not None
        return self.selection.similarities[self.selection.index]

    @property
    def is_accepted(self) -> bool:
        """Whether the selected candidate passed."""
        assert self.verdict is not None
        return self.verdict.is_accepted


@dataclass(frozen=True, slots=True)
class WrittenStep:
    """A step as it stands in the text.

    Of ``num_guessed`` tokens that the draft guessed it keeps ``num_kept``; ``num_reused`` tokens at
    its beginning are of a candidate that the target has read.
    """

    token_ids: tuple[int, ...]
    finish: CandidateFinish
    token_logprobs: FloatArray | None = None
    token_entropies: FloatArray | None = None
    num_guessed: int = 0
    num_kept: int = 0
    num_reused: int = 0

    @classmethod
    def of(cls, candidate: Candidate) -> "WrittenStep":
        """A candidate as it was drawn."""
        return cls(
            candidate.token_ids,
            candidate.finish,
            candidate.token_logprobs,
            candidate.token_entropies,
        )

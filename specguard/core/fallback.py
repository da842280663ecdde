"""When drafting does not pay: from the pair's cost ratio and what was accepted so far.

No clock is read, so that a solution is the same each time and on every machine.
"""

from dataclasses import dataclass

from specguard.core.errors import UsageError

_NUM_JUDGED = 3  # drafted steps before drafting is judged, and judged anew
_FIRST_PAUSE, _LONGEST_PAUSE = 4, 32  # steps that the target writes before drafting is tried again


@dataclass(frozen=True, slots=True)
class DraftCost:
    """What drafting costs, in decode steps of the target.

    ``candidate`` is a decode step of the draft for one candidate, ``further`` what each further
    one adds to it; ``verification`` is a pass over a step and what goes with it.

    Raises:
        UsageError: a negative cost.
    """

    candidate: float
    further: float = 0.0
    verification: float = 1.0

    def __post_init__(self) -> None:
        if min(self.candidate, self.further, self.verification) < 0:
            raise UsageError(f"a cost must not be negative: {self}")

    def of_step(self, num_candidates: int, num_longest: int) -> float:
        """Drafting and verifying a step whose longest candidate has ``num_longest`` tokens."""
        token = self.candidate + self.further * (num_candidates - 1)
        return token * num_longest + self.verification


class Fallback:
    """Switches drafting off after steps that cost more than the target's own would have.

    After a pause it is tried again; pauses double while it does not pay.
    """

    def __init__(self, cost: DraftCost | None) -> None:
        self._cost = cost
        self._spent = self._saved = 0.0
        self._num_seen = 0
        self._num_paused = 0
        self._pause = _FIRST_PAUSE

    @property
    def is_on(self) -> bool:
        """Whether the target is to write the next step without a draft."""
        return self._num_paused > 0

    def saw_plain(self) -> None:
        """The target has written a step of the pause."""
        self._num_paused -= 1

    def saw_drafted(
        self, num_candidates: int, num_longest: int, num_tokens: int, num_rewritten: int
    ) -> None:
        """A step of ``num_tokens`` was drafted, ``num_rewritten`` of which the target wrote."""
        if self._cost is None:
            return
        self._spent += self._cost.of_step(num_candidates, num_longest) + num_rewritten
        self._saved += num_tokens
        self._num_seen += 1
        if self._num_seen < _NUM_JUDGED:
            return
        if self._spent > self._saved:
            self._num_paused, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        else:
            self._pause = _FIRST_PAUSE
        self._spent = self._saved = 0.0
        self._num_seen = 0

"""When drafting does not pay: from what it costs and what was accepted so far.

What it costs is a figure from outside (`specguard.costs` measures it). No clock is read here, so
that with the same figure a solution is the same each time and on every machine.
"""

from dataclasses import astuple, dataclass, field
from math import inf
from typing import Literal

from specguard.core.errors import UsageError

TYPICAL_STEP = 30  # tokens, where no step is known yet
_MOST_CREDIT = 1.0  # steps of the target
_BROUGHT_BACK = 2  # accepted steps that bring all of the credit back
_AGAIN = 0.5  # of the credit, after a pause
_FIRST_PAUSE, _LONGEST_PAUSE = 4, 32  # steps that the target writes before drafting is tried again


@dataclass(frozen=True, slots=True)
class DraftCost:
    """What drafting costs, in decode steps of the target.

    ``candidate`` is a decode step of the draft for one candidate, ``further`` what each further
    one adds to it. Verifying a step costs ``verification``, and ``reading`` more for each token
    that is read. ``source`` says where the figures are from: "given" by somebody, "measured" on
    this machine, or taken from the models' "sizes".

    Raises:
        UsageError: a cost that is negative or not finite.
    """

    candidate: float
    further: float = 0.0
    verification: float = 1.0
    reading: float = 0.0
    source: Literal["given", "measured", "sizes"] = field(default="given", kw_only=True)

    def __post_init__(self) -> None:
        figures = astuple(self)[:-1]
        if not all(0 <= figure < inf for figure in figures):
            raise UsageError(f"a cost must be a number and not negative: {self}")

    def of_step(self, num_candidates: int, num_longest: int, num_read: int) -> float:
        """Drafting a step whose longest candidate has ``num_longest`` tokens, and verifying it.

        ``num_read`` tokens are verified, of all the candidates that are.
        """
        token = self.candidate + self.further * (num_candidates - 1)
        return token * num_longest + self.verification + self.reading * num_read

    def at_best(self, num_candidates: int, num_verified: int = 1) -> float:
        """The share of the target's own time that a typical step takes where it is accepted.

        ``num_verified`` of the candidates are verified. From 1 on, drafting cannot pay.
        """
        cost = self.of_step(num_candidates, TYPICAL_STEP, num_verified * TYPICAL_STEP)
        return cost / TYPICAL_STEP


class Fallback:
    """Switches drafting off where it costs more than the target's own steps would.

    Drafting has a credit of what two accepted steps bring back, one step of the target's time at
    most. A step that took r times what the target would have taken draws r - 1 on it, or pays 1 - r
    back. Used up, the target goes on alone for some steps, after which drafting is tried again with
    half of it; pauses double until the credit is whole. Where drafting could not pay if every step
    were accepted, it is never begun: ``at_best`` is what it would take then, as a share of the
    target's own time. ``pace`` is what a token costs that the target writes: below 1 where the
    draft guesses ahead.
    """

    def __init__(
        self, cost: DraftCost | None, num_candidates: int = 1, num_verified: int = 1
    ) -> None:
        self._cost = cost
        self.at_best = 0.0 if cost is None else cost.at_best(num_candidates, num_verified)
        self.pace = 1.0
        self._drawn = 0.0  # of the credit
        self._num_paused = 0
        self._pause = _FIRST_PAUSE

    @property
    def is_on(self) -> bool:
        """Whether the target is to write the next step without a draft."""
        return self.at_best >= self.pace or self._num_paused > 0

    def saw_plain(self) -> None:
        """The target has written a step of the pause."""
        self._num_paused = max(0, self._num_paused - 1)

    def saw_drafted(
        self,
        num_candidates: int,
        num_longest: int,
        num_read: int,
        num_tokens: int,
        num_rewritten: int,
        num_passes: int = 1,
    ) -> None:
        """A step of ``num_tokens`` was drafted, ``num_rewritten`` of which the target wrote.

        The longest of the candidates had ``num_longest`` tokens; ``num_read`` were verified, in
        ``num_passes``.
        """
        if self._cost is None:
            return
        spent = self._cost.of_step(num_candidates, num_longest, num_read)
        spent += (num_passes - 1) * self._cost.verification + num_rewritten * self.pace
        self._drawn += spent / (num_tokens * self.pace) - 1
        credit = min(_MOST_CREDIT, _BROUGHT_BACK * (1 - self.at_best / self.pace))
        if self._drawn <= 0:
            self._drawn, self._pause = 0.0, _FIRST_PAUSE
        elif self._drawn > credit:
            self._drawn = (1 - _AGAIN) * max(0.0, credit)
            self._num_paused, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)

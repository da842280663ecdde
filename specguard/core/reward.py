"""What judges steps by their text: process reward models, seen from the step loop.

A reward model has a tokenizer of its own, so it is spoken to in text. Its rewards say how probable
it is that a step is right: reward-guided speculative decoding accepts a draft step by them
(arXiv 2501.19324), best-of-n chooses among solutions.
"""

from collections.abc import Hashable, Sequence
from typing import Protocol


class RewardModel(Protocol):
    """A process reward model, ready to read problems."""

    @property
    def name(self) -> str:
        """Folder, hub id or other name to show to the user."""

    async def rewards(self, key: Hashable, problem: str, steps: Sequence[str]) -> list[float]:
        """The probability in [0, 1] that each step is right, given the problem and those before.

        ``steps`` are the texts of all steps so far, with or without the delimiter. What they share
        with the steps of the last call with this ``key`` is not computed again, so that asking
        after every step, replaced ones included, costs the new step only.

        Raises:
            SpecguardError: the solution does not fit the model's context window.
        """

    def release(self, key: Hashable) -> None:
        """The problem is over; unknown keys are fine."""

"""A process reward model as the step loop sees it: text in, probabilities out.

Such models have tokenizers of their own, so nothing of a pair's tokens passes here.
"""

from collections.abc import Sequence
from typing import Protocol


class RewardSequence(Protocol):
    """The judge of one problem's solution while it grows."""

    def rewards(self, steps: Sequence[str]) -> list[float]:
        """The probability that each step is right, of all steps of the solution so far.

        What successive calls have in common at the beginning is read once.
        """

    def close(self) -> None:
        """Give the KV back."""


class RewardModel(Protocol):
    """A process reward model."""

    @property
    def name(self) -> str:
        """Folder, hub id or other name to show to the user."""

    def start(self, problem: str) -> RewardSequence:
        """A judge for one problem."""

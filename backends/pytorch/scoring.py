"""The layout of a scoring pass: several continuations side by side behind one prefix."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from specguard.backends.pytorch.forward import SHARED


@dataclass(slots=True)
class Fan:
    """One row's queries: the pending token, then every continuation but for its last token.

    ``places`` are, for each continuation, where among the queries its tokens are predicted.
    """

    tokens: list[int]
    positions: list[int]
    owners: list[int]
    places: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, pending: int, num_cached: int, continuations: Sequence[Sequence[int]]) -> "Fan":
        """The fan behind a sequence's cached columns and its pending token."""
        fan = cls([pending], [num_cached], [SHARED])
        for owner, token_ids in enumerate(continuations):
            first, num_inputs = len(fan.tokens), len(token_ids) - 1
            fan.tokens += token_ids[:-1]
            fan.positions += range(num_cached + 1, num_cached + 1 + num_inputs)
            fan.owners += [owner] * num_inputs
            fan.places.append([0, *range(first, first + num_inputs)])
        return fan

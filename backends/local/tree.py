"""Tokens behind a prefix as a tree: what several candidates or continuations share is in it once.

Knows columns and masks of one row and no framework.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specguard.core.engine import BoolArray
from specguard.core.reference import is_reference


@dataclass(slots=True)
class Leaf:
    """The newest token of some candidates and the columns of its path, its own not among them."""

    token_id: int
    columns: list[int]
    members: list[int]


class CandidateTree:
    """The unfinished candidates of one sequence while they are drawn.

    Candidates with the same tokens so far are one leaf where ``is_merged``. The first ``base``
    columns hold the prefix; every pass appends a column for each leaf, from ``num_columns`` on.
    """

    def __init__(self, base: int, num_columns: int, is_merged: bool) -> None:
        self.base = base
        self.num_columns = num_columns
        self.leaves: list[Leaf] = []
        self._is_merged = is_merged and not is_reference()
        # [leaves, columns behind the base]; None where there is but one path, which sees them all.
        self._seen: BoolArray | None = None
        if num_columns > base:
            self._seen = np.zeros((1, num_columns - base), dtype=np.bool_)

    def grow(self, drawn: Sequence[tuple[int, int, int]]) -> None:
        """The leaves have been forwarded; these candidates go on: (leaf, token id, candidate).

        In the beginning the leaf is 0: what follows the prefix.
        """
        leaves: dict[tuple[int, ...], Leaf] = {}
        parents = []
        for parent, token_id, member in drawn:
            key = (parent, token_id) if self._is_merged else (member,)
            if key in leaves:
                leaves[key].members.append(member)
            else:
                leaves[key] = Leaf(token_id, self.columns_of(parent), [member])
                parents.append(parent)
        seen = self._with_own_columns()
        if seen is None and len(parents) > 1:
            seen = np.ones((1, self._end - self.base), dtype=np.bool_)
        self._seen = None if seen is None else seen[parents]
        self.num_columns = self._end
        self.leaves = list(leaves.values())

    def columns_of(self, leaf: int) -> list[int]:
        """The columns of all tokens on the way to a leaf, once it has been forwarded."""
        if not self.leaves:
            return []
        return [*self.leaves[leaf].columns, self.num_columns + leaf]

    def visible(self) -> BoolArray | None:
        """What each leaf sees behind the base, its own column included; None: everything."""
        return self._with_own_columns()

    @property
    def _end(self) -> int:
        return self.num_columns + len(self.leaves)

    def _with_own_columns(self) -> BoolArray | None:
        if self._seen is None or not self.leaves:
            return self._seen
        return np.concatenate([self._seen, np.eye(len(self.leaves), dtype=np.bool_)], axis=1)


@dataclass(frozen=True, slots=True)
class ContinuationTree:
    """Continuations behind a prefix as queries: the unread tokens of the prefix, then the tree.

    ``places`` are, for each continuation, where among the queries its tokens are predicted, and
    where the token behind them would be, if the last ones are forwarded, too. ``visible`` [queries,
    queries] is None where each query sees all before it.
    """

    token_ids: list[int]
    positions: list[int]
    places: list[list[int]]
    visible: BoolArray | None

    @classmethod
    def behind(
        cls,
        unread: Sequence[int],
        position: int,
        continuations: Sequence[Sequence[int]],
        forwards_last: bool,
    ) -> "ContinuationTree":
        """The tree behind ``unread`` tokens, the first of which has ``position``."""
        is_merged = not is_reference()
        n = len(unread)
        token_ids, positions = list(unread), list(range(position, position + n))
        places: list[list[int]] = []
        known: dict[tuple[int, ...], int] = {}  # place of a token behind a place
        for number, continuation in enumerate(continuations):
            path = [n - 1]
            for token_id in continuation if forwards_last else continuation[:-1]:
                key = (path[-1], token_id) if is_merged else (path[-1], token_id, number)
                if key not in known:
                    known[key] = len(token_ids)
                    token_ids.append(token_id)
                    positions.append(position + n - 1 + len(path))
                path.append(known[key])
            places.append(path)
        if len(token_ids) == n + len(places[0]) - 1:  # the first one's path is all there is
            return cls(token_ids, positions, places, None)
        visible = np.zeros((len(token_ids), len(token_ids)), dtype=np.bool_)
        visible[:n, :n] = np.tri(n, dtype=np.bool_)
        for path in places:
            for depth, place in enumerate(path[1:], 2):
                visible[place, :n] = True
                visible[place, path[1:depth]] = True
        return cls(token_ids, positions, places, visible)

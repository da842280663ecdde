"""Candidates while they are drawn: those with the same tokens so far are one branch.

A branch is forwarded once, whatever the number of its candidates; it parts where they draw
different tokens. Knows nothing of torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from specguard.backends.verbs import Draft
from specguard.core.model import BoolArray
from specguard.core.shortcuts import uses


@dataclass(slots=True)
class Branch:
    """A token that is to be forwarded, its position, and the candidates that it is of.

    ``row`` and ``slot`` are its place in the pass; ``columns`` hold the step's tokens before it,
    the sequence's pending token first.
    """

    row: int
    slot: int
    token_id: int
    position: int
    columns: list[int]
    members: list[int]


class Branches:
    """All unfinished candidates of several rows.

    Without the shortcut, a candidate has a branch of its own from its first token on.

    Every pass gives each row as many columns as the row with the most branches has queries;
    ``seen`` [branches, columns] are those before the pass that a branch may look at.
    """

    def __init__(self) -> None:
        self._is_merged = uses("tree")
        self.branches: list[Branch] = []
        self.seen: BoolArray = np.zeros((0, 0), dtype=np.bool_)

    def add(self, row: int, token_id: int, num_held: int, members: list[int]) -> None:
        """A sequence joins: its pending token, behind the row's first ``num_held`` columns."""
        self.branches.append(Branch(row, 0, token_id, num_held, [], members))
        own = np.arange(max(num_held, self.seen.shape[1])) < num_held
        self.seen = np.concatenate([_widened(self.seen, len(own)), own[None]])

    @property
    def alive(self) -> list[int]:
        """Candidates, branch by branch."""
        return [index for branch in self.branches for index in branch.members]

    @property
    def owners(self) -> list[int]:
        """The branch of each candidate in ``alive``."""
        return [number for number, branch in enumerate(self.branches) for _ in branch.members]

    def take(self, drafts: Mapping[int, Draft], token_ids: Sequence[int]) -> None:
        """Give each candidate in ``alive`` its token; the branches of those that go on follow.

        The branches have been forwarded, into columns behind all others.
        """
        grown: dict[tuple[int, ...], Branch] = {}
        parents: list[int] = []
        tokens = iter(token_ids)
        num_queries: dict[int, int] = {}
        first_new = self.seen.shape[1]
        for number, branch in enumerate(self.branches):
            row, columns = branch.row, [*branch.columns, first_new + branch.slot]
            for index in branch.members:
                token_id = next(tokens)
                if not drafts[index].take(token_id):
                    drafts[index].columns = columns
                    continue
                key = (number, token_id) if self._is_merged else (number, token_id, index)
                if key in grown:
                    grown[key].members.append(index)
                else:
                    slot = num_queries.get(row, 0)
                    num_queries[row] = slot + 1
                    grown[key] = Branch(row, slot, token_id, branch.position + 1, columns, [index])
                    parents.append(number)
        seen = np.zeros((len(parents), first_new + self.width), dtype=np.bool_)
        seen[:, :first_new] = self.seen[parents]
        own = [first_new + self.branches[parent].slot for parent in parents]
        seen[range(len(parents)), own] = True
        self.seen = seen
        self.branches = list(grown.values())

    @property
    def width(self) -> int:
        """Queries of the row that has the most."""
        return max((branch.slot for branch in self.branches), default=-1) + 1

    def queries(self, num_rows: int) -> tuple[list[list[int]], list[list[int]]]:
        """Tokens and their positions, row by row; a row that has none gets a filler."""
        tokens: list[list[int]] = [[] for _ in range(num_rows)]
        positions: list[list[int]] = [[] for _ in range(num_rows)]
        for branch in self.branches:
            tokens[branch.row].append(branch.token_id)
            positions[branch.row].append(branch.position)
        return [row or [0] for row in tokens], [row or [0] for row in positions]

    def visible(self, num_rows: int) -> BoolArray:
        """What each query may look at, its own columns included, [rows, width, columns].

        Queries that fill up a row see themselves: nobody sees them.
        """
        width, num_columns = self.width, self.seen.shape[1]
        found = np.zeros((num_rows, width, num_columns + width), dtype=np.bool_)
        found[:, :, num_columns:] = np.eye(width, dtype=np.bool_)
        rows = [branch.row for branch in self.branches]
        found[rows, [branch.slot for branch in self.branches], :num_columns] = self.seen
        return found

    def places(self) -> list[int]:
        """The place of each branch among all queries of the pass, row after row."""
        width = self.width
        return [branch.row * width + branch.slot for branch in self.branches]

    def held(self, row: int) -> list[int]:
        """Columns that a branch of the row still looks at."""
        own = [number for number, branch in enumerate(self.branches) if branch.row == row]
        return [int(column) for column in np.flatnonzero(self.seen[own].any(0))]

    def move(self, rows: Mapping[int, tuple[int, Sequence[int]]]) -> None:
        """Rows change place, and their columns follow one another from the left.

        Args:
            rows: for each row that stays its new place and its columns, ascending.
        """
        num_columns = max(len(columns) for _, columns in rows.values())
        seen = np.zeros((len(self.branches), num_columns), dtype=np.bool_)
        for number, branch in enumerate(self.branches):
            branch.row, columns = rows[branch.row]
            seen[number, : len(columns)] = self.seen[number, columns]
            branch.columns = moved(branch.columns, columns)
        self.seen = seen


def moved(columns: Sequence[int], kept: Sequence[int]) -> list[int]:
    """Where columns lie once the ``kept`` ones, ascending, follow one another from the left."""
    return [int(place) for place in np.searchsorted(kept, columns)]


def _widened(seen: BoolArray, num_columns: int) -> BoolArray:
    more = np.zeros((len(seen), num_columns - seen.shape[1]), dtype=np.bool_)
    return np.concatenate([seen, more], axis=1)

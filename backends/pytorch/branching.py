"""Candidates while they are drawn: those with the same tokens so far are one branch.

A branch is forwarded once, whatever the number of its candidates; it parts where they draw
different tokens. Knows nothing of torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specguard.backends.verbs import Draft
from specguard.core.model import BoolArray


@dataclass(slots=True)
class Branch:
    """Its row and place among the row's queries, its newest token, its columns and candidates."""

    row: int
    slot: int
    token_id: int
    columns: list[int]
    members: list[int]


class Branches:
    """All unfinished candidates of a batch of sequences.

    Every pass gives each row as many columns as the row with the most branches has queries;
    ``paths`` [branches, columns since the pending tokens] are those that a branch may look at.
    """

    def __init__(self, drafts: Sequence[Draft], num_rows: int, first_column: int) -> None:
        self._drafts = drafts
        self._first_column = first_column
        members: list[list[int]] = [[] for _ in range(num_rows)]
        for index, draft in enumerate(drafts):
            members[draft.row].append(index)
        self.branches = [
            Branch(row, 0, -1, [first_column], found) for row, found in enumerate(members)
        ]
        self._num_rows = num_rows
        self.paths: BoolArray = np.ones((num_rows, 1), dtype=np.bool_)

    @property
    def alive(self) -> list[int]:
        """Candidates, branch by branch."""
        return [index for branch in self.branches for index in branch.members]

    @property
    def owners(self) -> list[int]:
        """The branch of each candidate in ``alive``."""
        return [number for number, branch in enumerate(self.branches) for _ in branch.members]

    def take(self, token_ids: Sequence[int]) -> None:
        """Give each candidate in ``alive`` its token; the branches of those that go on follow."""
        grown: dict[tuple[int, int], Branch] = {}
        parents: list[int] = []
        tokens = iter(token_ids)
        num_queries = [0] * self._num_rows
        first_new = self._first_column + self.paths.shape[1]
        for number, branch in enumerate(self.branches):
            row = branch.row
            for index in branch.members:
                token_id = next(tokens)
                if not self._drafts[index].take(token_id):
                    self._drafts[index].columns = branch.columns
                elif (number, token_id) in grown:
                    grown[number, token_id].members.append(index)
                else:
                    slot = num_queries[row]
                    num_queries[row] += 1
                    columns = [*branch.columns, first_new + slot]
                    grown[number, token_id] = Branch(row, slot, token_id, columns, [index])
                    parents.append(number)
        self.branches = list(grown.values())
        own = np.zeros((len(parents), max(num_queries)), dtype=np.bool_)
        own[np.arange(len(parents)), [branch.slot for branch in self.branches]] = True
        self.paths = np.concatenate([self.paths[parents], own], axis=1)

    @property
    def rows(self) -> list[int]:
        """Rows that still have a branch."""
        return sorted({branch.row for branch in self.branches})

    def keep(self, rows: Sequence[int]) -> None:
        """Other rows are gone; these follow one another."""
        places = {row: place for place, row in enumerate(rows)}
        for branch in self.branches:
            branch.row = places[branch.row]
        self._num_rows = len(rows)

    def queries(self, lengths: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
        """Newest tokens and their positions, row by row; ``lengths`` of the sequences."""
        tokens: list[list[int]] = [[] for _ in lengths]
        positions: list[list[int]] = [[] for _ in lengths]
        for branch in self.branches:
            tokens[branch.row].append(branch.token_id)
            positions[branch.row].append(lengths[branch.row] + len(branch.columns) - 2)
        return tokens, positions

    def visible(self) -> BoolArray:
        """What each query may look at among the columns since the pending tokens, [B, q, columns].

        Queries that fill up a row see its pending token.
        """
        width = max(branch.slot for branch in self.branches) + 1
        seen = np.zeros((self._num_rows, width, self.paths.shape[1]), dtype=np.bool_)
        seen[:, :, 0] = True
        rows = [branch.row for branch in self.branches]
        seen[rows, [branch.slot for branch in self.branches]] = self.paths
        return seen

    def places(self) -> list[int]:
        """The place of each branch among all queries of the pass, row after row."""
        width = max(branch.slot for branch in self.branches) + 1
        return [branch.row * width + branch.slot for branch in self.branches]

"""What an engine keeps of a problem, and the one rule by which the next job finds it.

For each key: a sequence, and the branches that the last job left behind it (candidates that it
drew, continuations that it scored). The next job's prefix is compared with them token by token; the
longest match is adopted, the rest is forwarded with whatever comes next. So an accepted step is not
computed again, a rejected one leaves no trace, and no result depends on what is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from specguard.backends.local.layer import Buffer, Outputs


@dataclass(slots=True)
class Branch:
    """Tokens behind a sequence, and the columns of the first ones, or of all.

    ``ahead`` is the output of the last token where it was forwarded: what is known of the next.
    """

    token_ids: tuple[int, ...]
    columns: list[int]
    ahead: Outputs | None = None


@dataclass(slots=True, eq=False)
class KeptSequence:
    """Tokens whose columns are the first ones of the buffer, and branches behind them.

    ``num_columns`` are in use, the branches' among them. ``ahead`` is the last token's output,
    where it is known. ``is_busy`` while a job reads or draws here: no other job may.
    """

    buffer: Buffer
    token_ids: tuple[int, ...] = ()
    branches: list[Branch] = field(default_factory=list)
    num_columns: int = 0
    ahead: Outputs | None = None
    is_busy: bool = False

    def adopt(self, prefix: tuple[int, ...], keeps_branches: bool = False) -> None:
        """Become the longest beginning of ``prefix`` that is there.

        Branches stay where the sequence is all of the prefix and they are wanted.
        """
        if keeps_branches and prefix == self.token_ids:
            return
        num_known = common_length(self.token_ids, prefix)
        if num_known < len(self.token_ids):
            self.ahead = None
        elif self.branches:
            rest = prefix[num_known:]
            lengths = [
                common_length(branch.token_ids[: len(branch.columns)], rest)
                for branch in self.branches
            ]
            num_found = max(lengths)
            if num_found:
                branch = self.branches[lengths.index(num_found)]
                columns = branch.columns[:num_found]
                if columns != list(range(num_known, num_known + num_found)):
                    self.buffer.copy_columns(num_known, columns)
                is_whole = num_found == len(branch.token_ids)
                self.ahead = branch.ahead if is_whole else None
                num_known += num_found
        self.token_ids = prefix[:num_known]
        self.num_columns = num_known
        self.branches = []

    def drop_last(self) -> None:
        """Forget the last token, so that it is forwarded again."""
        self.token_ids = self.token_ids[:-1]
        self.ahead = None

    def hold(self, token_ids: tuple[int, ...]) -> None:
        """More tokens have been forwarded, into the columns that come next."""
        self.token_ids = token_ids
        self.num_columns = max(self.num_columns, len(token_ids))
        self.ahead = None


def common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """How many items two sequences have in common from the beginning on."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(place for place in range(length) if first[place] != second[place])

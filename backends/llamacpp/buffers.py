"""The driver's columns on llama.cpp's sequences: which sequence a token goes on with.

The driver thinks in columns and in what each token sees of them; llama.cpp in sequences, whose
tokens see all that their sequence has before them. A path of columns is a sequence here: one that
ends where a token's path begins goes on with it, else one that begins so is forked. Knows nothing
of llama.cpp but cells, and that a context has only so many sequences.
"""

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from specguard.backends.local.layer import Row
from specguard.core.engine import BoolArray
from specguard.core.errors import SpecguardError

Cells = NDArray[np.int64]

_MOST_BUFFERS = 8  # problems that share a context, its passes and its cells
_FEWEST_FREE = 16  # sequences that a context must have left for one more


class Sequences(Protocol):
    """What a context does with sequences by number."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Make a sequence that is empty begin as another one."""

    def cut(self, sequence: int, length: int) -> None:
        """Forget what a sequence has from this position on."""


@dataclass(frozen=True, slots=True)
class Path:
    """Columns in order of positions: the first ``lead`` ones of all, then ``tail``."""

    lead: int
    tail: tuple[int, ...] = ()

    @classmethod
    def of(cls, lead: int, tail: Sequence[int]) -> "Path":
        """A path whose tail does not begin with the column behind its lead."""
        place = 0
        while place < len(tail) and tail[place] == lead:
            lead, place = lead + 1, place + 1
        return cls(lead, tuple(tail[place:]))

    def __len__(self) -> int:
        return self.lead + len(self.tail)

    def begins_with(self, other: "Path") -> bool:
        """Whether the other path is a beginning of this one."""
        if not other.tail:
            return self.lead >= other.lead
        return self.lead == other.lead and self.tail[: len(other.tail)] == other.tail

    def before(self, column: int) -> "Path":
        """The beginning that lies before a column; columns ascend along a path."""
        if column <= self.lead:
            return Path(column)
        return Path(self.lead, tuple(each for each in self.tail if each < column))

    def followed_by(self, columns: Sequence[int]) -> "Path":
        """The path with more columns behind it."""
        if self.tail:
            return Path(self.lead, self.tail + tuple(columns))
        return Path.of(self.lead, columns)


C = TypeVar("C", bound=Sequences)


class Pool(Generic[C]):
    """The sequences of one context, by number, shared by some buffers."""

    def __init__(self, sequences: C, count: int) -> None:
        self.sequences = sequences
        self._free = list(range(count - 1, -1, -1))
        self._dead: deque[set[int]] = deque()  # of buffers that nobody holds any more
        self.buffers: weakref.WeakSet[KVBuffer] = weakref.WeakSet()

    @property
    def has_room(self) -> bool:
        """Whether one more buffer may join."""
        self.clean()
        return len(self.buffers) < _MOST_BUFFERS and len(self._free) >= _FEWEST_FREE

    def join(self, buffer: "KVBuffer", numbers: set[int]) -> None:
        """A buffer's sequences come from here; ``numbers`` are to hold them."""
        self.buffers.add(buffer)
        # Whoever lets go of a buffer may be in any thread, in the middle of a pass.
        weakref.finalize(buffer, self._dead.append, numbers).atexit = False

    def clean(self) -> None:
        """Take back what buffers that are gone have left."""
        while self._dead:
            for number in self._dead.popleft():
                self.give_back(number)

    def take(self) -> int:
        """The number of an empty sequence.

        Raises:
            SpecguardError: all are in use.
        """
        self.clean()
        if not self._free:
            raise SpecguardError(
                "llama.cpp has no more sequences for the candidates",
                "fewer candidates (--k), or fewer problems at a time",
            )
        return self._free.pop()

    def give_back(self, number: int) -> None:
        """A sequence is of no more use."""
        self.sequences.cut(number, 0)
        self._free.append(number)


@dataclass(frozen=True, slots=True)
class Plan:
    """For each query of a row, the sequences that go on with it.

    ``grown`` are their paths once the row has been forwarded; a ``passing`` sequence is given up
    then, as its columns are known.
    """

    sequences: list[tuple[int, ...]]
    grown: dict[int, Path]
    passing: int | None = None


@dataclass(frozen=True, slots=True)
class Unread:
    """Columns that have to be read before anything can follow them, and their paths."""

    token_ids: list[int]
    paths: list[Path]

    def visible(self) -> tuple[BoolArray, list[int]]:
        """What each column sees [n, n], and the positions."""
        n = len(self.token_ids)
        visible, positions = np.zeros((n, n), dtype=np.bool_), [0] * n
        for path in self.paths:
            columns = [*range(path.lead), *path.tail]
            for position, column in enumerate(columns):
                visible[column, columns[: position + 1]] = True
                positions[column] = position
        return visible, positions


class KVBuffer:
    """Columns of one problem: their cells, their token ids, and sequences that are paths of them.

    Belongs to a pool from its first use on.
    """

    def __init__(self) -> None:
        self.pool: Pool[Any] | None = None
        self.unread: Unread | None = None
        self.cells: Cells = np.empty(0, dtype=np.int64)
        self.token_ids: list[int] = []
        self._paths: dict[int, Path] = {}
        self._numbers: set[int] = set()

    def join(self, pool: Pool[Any]) -> None:
        """Live in this pool's context."""
        self.pool, self._numbers = pool, set()
        pool.join(self, self._numbers)

    def leave(self) -> None:
        """Live nowhere: what was known has to be read again."""
        if self.token_ids:
            self.unread = Unread(self.token_ids, list(self._paths.values()))
        self.pool, self._paths, self.token_ids = None, {}, []
        self.cells = self.cells[:0]

    def copy_from(self, other: "KVBuffer", length: int) -> None:
        """Become a copy of another buffer's first columns, which are shared where there is room."""
        if other.pool is None or not other.pool.has_room:
            known = other.token_ids if other.unread is None else other.unread.token_ids
            self.unread = Unread(known[:length], [Path(length)])
            return
        self.join(other.pool)
        number = self._new(other.sequence_with(Path(length)), length)
        self._paths[number] = Path(length)
        self.cells, self.token_ids = other.cells[:length].copy(), other.token_ids[:length]

    def copy_columns(self, start: int, columns: Sequence[int]) -> None:
        """These columns come to lie from ``start`` on; nothing is moved."""
        path = Path.of(start, columns)
        order = [*range(start), *columns]
        if self.unread is not None:
            known = self.unread.token_ids
            self.unread = Unread([known[column] for column in order], [Path(len(path))])
            return
        number = self.sequence_with(path)
        for other in self._numbers - {number}:
            self._drop(other)
        self._cut(number, path)
        self._paths[number] = Path(len(path))
        self.cells = self.cells[order]
        self.token_ids = [self.token_ids[column] for column in order]

    def sequence_with(self, path: Path) -> int:
        """A sequence that begins so."""
        for number, known in self._paths.items():
            if known.begins_with(path):
                return number
        raise RuntimeError(f"no sequence has the columns {path}")

    def plan(self, row: Row, token_ids: Sequence[int]) -> Plan:
        """Forget what lies behind the row's start, and find sequences for its queries."""
        if self._is_repeated(row, token_ids):
            number = self._new(self.sequence_with(Path(row.start)), row.start)
            return Plan([(number,)], {}, passing=number)
        self._truncate(row.start)
        n = row.num_queries
        if row.visible is None:
            new = np.tri(n, dtype=np.bool_)
            before = [Path(row.start)] * n
        else:
            new = row.visible[:, row.start - row.base :]
            olds = row.visible[:, : row.start - row.base]
            before = [Path.of(row.base, (np.flatnonzero(old) + row.base).tolist()) for old in olds]
        # Queries that nobody sees but themselves are the ends of paths.
        ends = np.flatnonzero(new.sum(0) == 1).tolist()
        taken: set[int] = set()
        sequences: list[list[int]] = [[] for _ in range(n)]
        grown = {}
        for end in ends:
            number = self._sequence_for(before[end], taken)
            taken.add(number)
            own = np.flatnonzero(new[end])
            for query in own.tolist():
                sequences[query].append(number)
            grown[number] = before[end].followed_by((own + row.start).tolist())
        return Plan([tuple(each) for each in sequences], grown)

    def extend(self, plan: Plan, cells: Cells, token_ids: Sequence[int]) -> None:
        """The row has been forwarded."""
        if plan.passing is not None:
            self._numbers.discard(plan.passing)
            assert self.pool is not None
            self.pool.give_back(plan.passing)
            return
        self._paths |= plan.grown
        self.cells = np.concatenate([self.cells, cells])
        self.token_ids += token_ids

    def _is_repeated(self, row: Row, token_ids: Sequence[int]) -> bool:
        """Whether a row is the one token that is known there, with columns behind it.

        What follows it is asked for once more, while branches that begin with it are kept.
        """
        stop = row.stop
        return (
            row.num_queries == 1
            and row.visible is None
            and not row.captures
            and stop < len(self.token_ids)
            and self.token_ids[row.start] == token_ids[0]
            and any(path.lead >= stop for path in self._paths.values())
        )

    def _sequence_for(self, path: Path, taken: set[int]) -> int:
        """A sequence that ends with a path and nobody has taken, or a fork of one."""
        for number, known in self._paths.items():
            if known == path and number not in taken:
                return number
        number = self._new(self.sequence_with(path) if len(path) else None, len(path))
        self._paths[number] = path
        return number

    def _new(self, source: int | None, length: int) -> int:
        assert self.pool is not None
        number = self.pool.take()
        self._numbers.add(number)
        if source is not None and length:
            self.pool.sequences.copy(source, number, length)
        return number

    def _truncate(self, start: int) -> None:
        if len(self.token_ids) == start:
            return
        self.cells, self.token_ids = self.cells[:start], self.token_ids[:start]
        for number, path in list(self._paths.items()):
            self._cut(number, path.before(start))
        paths = self._paths
        for number, path in list(paths.items()):
            others = (known for other, known in paths.items() if other != number)
            if any(known.begins_with(path) for known in others):
                self._drop(number)

    def _cut(self, number: int, path: Path) -> None:
        """Leave a beginning of a sequence."""
        assert self.pool is not None
        if len(path) < len(self._paths[number]):
            self.pool.sequences.cut(number, len(path))
        self._paths[number] = path

    def _drop(self, number: int) -> None:
        assert self.pool is not None
        del self._paths[number]
        self._numbers.discard(number)
        self.pool.give_back(number)

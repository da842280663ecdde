"""What a framework has to compute for the driver: passes over rows, and tokens from logits.

A pass forwards N tokens, row after row; a row is one sequence's share of it, with a buffer of its
own. Rows are neither stacked nor padded: everything but attention sees N tokens, and attention sees
one row at a time. Arrays of the framework travel through the driver unopened.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self

from specguard.core.engine import AttentionBlock, BoolArray, Capture, FloatArray, Sampling

Array = Any  # of the framework


class Buffer(Protocol):
    """Keys and values of one sequence, all layers; columns are filled from the left."""

    def copy_columns(self, start: int, columns: Sequence[int]) -> None:
        """Write these columns, ascending, again from ``start`` on, which lies before them."""

    def copy_from(self, other: Self, length: int) -> None:
        """Become a copy of another buffer's first columns."""


@dataclass(slots=True, eq=False)
class RowCapture:
    """What a row is to read of one continuation's attention.

    ``queries`` [n] are the row's queries that predict the n tokens, ``columns`` [c + n - 1] those
    of the positions 0 .. c+n-2. The layer puts ``blocks`` there, from the lowest layer to the top.
    """

    capture: Capture
    queries: list[int]
    columns: list[int]
    blocks: list[AttentionBlock] = field(default_factory=list)

    @property
    def is_last_source(self) -> bool:
        """Whether position c-1, the first row's own token, is a source."""
        return bool(self.capture.is_source[-1])


@dataclass(slots=True, eq=False)
class Row:
    """One sequence's share of a pass: ``num_queries`` tokens, whose columns begin at ``start``.

    All queries see the columns before ``base``. ``visible`` [queries, columns from ``base`` to the
    last new one] says what each sees behind them; None: everything before it.
    """

    buffer: Buffer
    start: int
    num_queries: int
    base: int
    visible: BoolArray | None = None
    captures: list[RowCapture] = field(default_factory=list)

    @property
    def stop(self) -> int:
        """The column behind the last new one."""
        return self.start + self.num_queries


class Outputs(NamedTuple):
    """Final hidden states [A, H] and logits [A, V] of some queries of a pass."""

    hidden: Array
    logits: Array


class TensorLayer(Protocol):
    """A model on a framework; token ids beyond the tokenizer's are cut off its logits."""

    @property
    def num_layers(self) -> int:
        """Layers whose attention can be captured."""

    @property
    def num_bytes_per_token(self) -> int:
        """What one token's keys and values take."""

    @property
    def reads_late(self) -> bool:
        """Whether tokens are read while the pass over them is under way.

        It pays where passes run beside Python. Where they do not, tokens are read before the pass,
        and candidates that have drawn the same ones so far share it.
        """

    @property
    def most_waiting_logits(self) -> int:
        """Numbers that `describe` is better handed together than pass by pass."""

    def new_buffer(self) -> Buffer:
        """An empty buffer."""

    def forward(
        self,
        rows: Sequence[Row],
        token_ids: Sequence[int] | Array,
        positions: Sequence[int],
        wanted: Sequence[int] | None,
    ) -> Outputs | None:
        """Forward tokens [N], write their columns, fill the rows' captures.

        ``wanted`` are the queries among all N whose outputs are handed over; None for none.
        """

    def sample(
        self, logits: Array, owners: Sequence[int], sampling: Sampling, uniforms: FloatArray
    ) -> Array:
        """Token ids [N], the inverse CDF of ``uniforms`` [N] in the rows ``owners`` of logits."""

    def read(self, token_ids: Array) -> list[int]:
        """Token ids as numbers; waits until they are there."""

    def describe(
        self, parts: Sequence[tuple[Array, Sequence[int], Array | Sequence[int]]]
    ) -> tuple[Array, Array]:
        """Log-probabilities and entropies (nats), float32 [N], at temperature 1.

        Each part is logits [A, V], a row of them for each token, and token ids.
        """

    def first_choices(self, logits: Array) -> FloatArray:
        """The most probable token id [A] of each row."""

    def warp(self, logits: Array, sampling: Sampling) -> Array:
        """Probabilities [A, V] after temperature and top-p; one-hot where sampling is greedy."""

    def sums(
        self, hidden: Sequence[Array], rows: Sequence[int], owners: Sequence[int], count: int
    ) -> FloatArray:
        """Sums [count, H], by owner, of rows of hidden states [A, H], one after the other."""

    def take(self, outputs: Outputs, rows: Sequence[int]) -> Outputs:
        """Some rows of outputs, which keep nothing of the others and may be used by any thread."""

    def joined(self, parts: Sequence[Outputs]) -> Outputs:
        """Outputs one after the other."""

    def numpy(self, array: Array) -> FloatArray:
        """Numbers in float32, once they are computed."""

    def synchronize(self) -> None:
        """Wait for the device, so that what a job costs is not counted with the next."""

    def computing(self, name: str) -> AbstractContextManager[None]:
        """Everything is done inside; that memory ran out comes out as a `SpecguardError`."""

"""A model on llama.cpp as a tensor layer: passes over rows, with capture.

Knows nothing of steps, and of llama.cpp only its contexts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from specguard.backends.llamacpp.buffers import KVBuffer, Pool, Sequences
from specguard.backends.llamacpp.capture import attention_block
from specguard.backends.llamacpp.context import Decoded, Floats, Microbatch
from specguard.backends.llamacpp.sampling import (
    Scratch,
    TokenIds,
    describe,
    first_choices,
    sample,
    warp,
)
from specguard.backends.local.drawing import not_finite
from specguard.backends.local.layer import Outputs, Row, RowCapture
from specguard.core.engine import FloatArray, Sampling
from specguard.core.errors import SpecguardError

NUM_SEQUENCES = 128  # of a context; llama.cpp itself takes 256, and has room for as many outputs
_FIRST_CELLS = 2048  # of a context; it takes more as they are needed
_ROUNDING = 1e-3  # of a row of softmax weights


class Context(Sequences, Protocol):
    """Cells and sequences of one model, see `specguard.backends.llamacpp.context`."""

    num_cells: int

    def decode(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[Sequence[int]],
        is_wanted: Sequence[bool],
        first_layer: int | None = None,
    ) -> Decoded:
        """Forward tokens [N], each for the sequences that go on with it."""

    def grow(self, num_cells: int) -> None:
        """Take more cells. Those in use keep their order and become the first ones."""


class Model(Protocol):
    """What contexts are opened over."""

    name: str
    num_layers: int
    num_bytes_per_token: int

    def open_context(self, num_cells: int) -> Context:
        """An empty one."""


class LlamaLayer:
    """Runs the passes of one model; logits are cut to ``num_tokens``."""

    reads_late = False
    most_waiting_logits = 0  # they lie in llama.cpp's own memory, which the next pass writes

    def __init__(self, model: Model, num_tokens: int) -> None:
        self._model, self._num_tokens = model, num_tokens
        self.num_layers: int = model.num_layers
        self.num_bytes_per_token: int = model.num_bytes_per_token
        self._pools: list[Pool[Context]] = []
        self._scratch = Scratch()

    def new_buffer(self) -> KVBuffer:
        """An empty buffer."""
        return KVBuffer()

    def forward(
        self,
        rows: Sequence[Row],
        token_ids: Sequence[int],
        positions: Sequence[int],
        wanted: Sequence[int] | None,
    ) -> Outputs | None:
        """Forward tokens [N]; hidden states and logits of the wanted queries.

        The logits hold until the next pass.
        """
        if len(self._pools) > 1:  # a context in which nobody lives any more goes
            self._pools = [pool for pool in self._pools if len(pool.buffers)] or self._pools[:1]
        firsts, first = [], 0
        for row in rows:
            firsts.append(first)
            first += row.num_queries
            self._place(_buffer(row))
        is_wanted = np.zeros(len(token_ids), dtype=np.bool_)
        is_wanted[list(wanted or ())] = True
        parts: list[tuple[list[int], Outputs]] = []
        for pool in dict.fromkeys(_buffer(row).pool for row in rows):
            assert pool is not None
            own = [
                (row, first)
                for row, first in zip(rows, firsts, strict=True)
                if _buffer(row).pool is pool
            ]
            queries = [
                query for row, first in own for query in range(first, first + row.num_queries)
            ]
            decoded = self._decode(
                pool,
                [row for row, _ in own],
                [int(token_ids[query]) for query in queries],
                [positions[query] for query in queries],
                is_wanted[queries],
            )
            outputs = Outputs(decoded.hidden, decoded.logits[:, : self._num_tokens])
            parts.append(([query for query in queries if is_wanted[query]], outputs))
        if wanted is None:
            return None
        order = [query for queries, _ in parts for query in queries]
        outputs = self.joined([outputs for _, outputs in parts])
        if order == list(wanted):
            return outputs
        places = {query: place for place, query in enumerate(order)}
        return self.take(outputs, [places[query] for query in wanted])

    def sample(
        self, logits: Floats, owners: Sequence[int], sampling: Sampling, uniforms: FloatArray
    ) -> TokenIds:
        """Token ids [N]."""
        return sample(logits, owners, sampling, uniforms, self._scratch)

    def read(self, token_ids: TokenIds) -> list[int]:
        """Token ids as numbers."""
        found: list[int] = token_ids.tolist()
        return found

    def describe(
        self, parts: Sequence[tuple[Floats, Sequence[int], TokenIds | Sequence[int]]]
    ) -> tuple[FloatArray, FloatArray]:
        """Log-probabilities and entropies [N]."""
        found = [describe(*part, self._scratch) for part in parts]
        logprobs, entropies = map(np.concatenate, zip(*found, strict=True))
        return logprobs, entropies

    def first_choices(self, logits: Floats) -> Any:
        """The most probable token id of each row."""
        return first_choices(logits)

    def warp(self, logits: Floats, sampling: Sampling) -> FloatArray:
        """Warped probabilities."""
        return warp(logits, sampling, self._scratch)

    def sums(
        self, hidden: Sequence[Floats], rows: Sequence[int], owners: Sequence[int], count: int
    ) -> FloatArray:
        """Sums of hidden states by owner."""
        states = np.concatenate(hidden)
        found = np.zeros((count, states.shape[1]), dtype=np.float32)
        np.add.at(found, list(owners), states[list(rows)])
        return found

    def take(self, outputs: Outputs, rows: Sequence[int]) -> Outputs:
        """Copies of some rows of outputs."""
        return Outputs(outputs.hidden[list(rows)], outputs.logits[list(rows)])

    def joined(self, parts: Sequence[Outputs]) -> Outputs:
        """Outputs one after the other."""
        if len(parts) == 1:
            return parts[0]
        return Outputs(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def numpy(self, array: Floats) -> FloatArray:
        """The same."""
        return array

    def synchronize(self) -> None:
        """Nothing: passes are over when they return."""

    @contextmanager
    def computing(self, name: str) -> Iterator[None]:
        """Say in one line that memory ran out."""
        try:
            yield
        except MemoryError as error:
            raise SpecguardError(
                f"memory ran out while {name} was running",
                "fewer candidates (--k), fewer problems at a time, a shorter context or a smaller "
                "pair need less; or close other programs",
            ) from error

    def _place(self, buffer: KVBuffer) -> None:
        """Give a buffer a context to live in, and read what it could not share or has lost."""
        if buffer.pool is not None:
            return
        pool = next((pool for pool in self._pools if pool.has_room), None)
        if pool is None:
            pool = Pool(self._model.open_context(_FIRST_CELLS), NUM_SEQUENCES)
            self._pools.append(pool)
        buffer.join(pool)
        unread, buffer.unread = buffer.unread, None
        if unread is not None:
            visible, positions = unread.visible()
            row = Row(buffer, 0, len(positions), 0, visible)
            self.forward([row], unread.token_ids, positions, None)

    def _decode(
        self,
        pool: Pool[Context],
        rows: Sequence[Row],
        token_ids: list[int],
        positions: list[int],
        is_wanted: Any,
    ) -> Decoded:
        """The share of a pass that lies in one context."""
        context: Context = pool.sequences
        ends = list(accumulate(row.num_queries for row in rows))
        parts = [slice(end - row.num_queries, end) for row, end in zip(rows, ends, strict=True)]
        plans = [
            _buffer(row).plan(row, token_ids[part]) for row, part in zip(rows, parts, strict=True)
        ]
        pool.clean()
        _make_room(pool, context, len(token_ids))
        captured = [capture.capture.num_layers for row in rows for capture in row.captures]
        decoded = context.decode(
            token_ids,
            positions,
            [numbers for plan in plans for numbers in plan.sequences],
            is_wanted,
            self.num_layers - max(captured) if captured else None,
        )
        if not np.isfinite(decoded.hidden).all():
            self._retire(pool)
            raise not_finite(self._model.name)
        for row, plan, part in zip(rows, plans, parts, strict=True):
            _buffer(row).extend(plan, decoded.cells[part], token_ids[part])
            for capture in row.captures:
                queries = [part.start + query for query in capture.queries]
                cells = _buffer(row).cells[capture.columns]
                self._read_attention(capture, queries, cells, decoded.microbatches)
        return decoded

    def _retire(self, pool: Pool[Context]) -> None:
        """Use a context no more.

        What is no number in one cell spoils every sequence: those that may not see it give it no
        weight, and nothing times no number is no number. All are read again elsewhere.
        """
        self._pools.remove(pool)
        for buffer in list(pool.buffers):
            buffer.leave()

    def _read_attention(
        self,
        capture: RowCapture,
        queries: Sequence[int],
        cells: Any,
        microbatches: Sequence[Microbatch],
    ) -> None:
        for layer in range(self.num_layers - capture.capture.num_layers, self.num_layers):
            weights = _weights(layer, queries, cells, microbatches)
            if np.abs(weights.sum(-1) - 1).max() > _ROUNDING:
                raise SpecguardError(
                    f"layer {layer} attends to more than the tokens before it",
                    "verify by log-probability alone: --beta 1",
                )
            capture.blocks.append(attention_block(weights, capture))


def _weights(
    layer: int, queries: Sequence[int], cells: Any, microbatches: Sequence[Microbatch]
) -> Floats:
    """Softmax weights [heads, n, width] of queries of a pass, in the columns of these cells."""
    parts, first = [], 0
    for part in microbatches:
        rows = [query - first for query in queries if 0 <= query - first < part.num_tokens]
        first += part.num_tokens
        if not rows:
            continue
        whole = part.weights[layer]
        # Cells behind those that this graph looked at were filled later.
        own = np.zeros((len(whole), len(rows), len(cells)), dtype=np.float32)
        is_seen = cells < whole.shape[-1]
        own[..., is_seen] = whole[:, rows][..., cells[is_seen]]
        parts.append(own)
    return np.concatenate(parts, axis=1)


def _make_room(pool: Pool[Context], context: Context, num_new: int) -> None:
    """Take more cells where those in use and the new ones may be too many."""
    needed = sum(len(buffer.cells) for buffer in pool.buffers) + num_new
    if needed <= context.num_cells:
        return
    size = context.num_cells
    while size < needed:
        size *= 2
    used = np.unique(np.concatenate([buffer.cells for buffer in pool.buffers]))
    context.grow(size)
    for buffer in pool.buffers:
        buffer.cells = np.searchsorted(used, buffer.cells)


def _buffer(row: Row) -> KVBuffer:
    assert isinstance(row.buffer, KVBuffer)
    return row.buffer

"""Passes of fixed shapes: so many slots, queries a slot and columns, at addresses that stay.

A pass over few queries is bound by the launching of its kernels, not by the GPU. Here nothing in it
depends on what is computed and nothing waits for the device, so that CUDA records it once, as a
graph, and launches it as one. Elsewhere, and where recording fails, the same function runs eagerly.
"""

from collections.abc import Sequence
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specguard.backends.local.layer import Row
from specguard.backends.pytorch.fused import FusedLayers
from specguard.backends.pytorch.placing import see, send
from specguard.backends.pytorch.slots import Slot, SlotPool

_MOST_QUERIES = 256  # of a pass; beyond, the GPU is busy, and what is computed for no one costs
_FEWEST_COLUMNS = 256
_FEWEST_POSITIONS = 4096  # a sequence may have later ones than columns
_ADDS_IN_FLOAT32 = "dtype" in torch.ops.aten.baddbmm.overloads()  # on CUDA, from torch 2.9 on
_RECORDING = Lock()  # a second recording at a time would disturb the first
_TOKENS, _POSITIONS, _COLUMNS, _PLACES = range(4)


class FixedShape(NamedTuple):
    """The first ``slots`` of a pool, ``queries`` of each, and the ``columns`` that they may see."""

    slots: int
    queries: int
    columns: int


class FixedPasses:
    """Passes over rows that lie in a pool, recorded shape by shape, when one is wanted again.

    ``why_not_recorded`` says why passes run eagerly, None where they are recorded or none has run.
    """

    def __init__(self, layers: FusedLayers, pool: SlotPool) -> None:
        self._layers, self._pool = layers, pool
        self._passes: dict[FixedShape, _FixedPass] = {}
        self._memory: Any = None  # which all graphs share
        self._stream: torch.cuda.Stream | None = None  # on which all are recorded
        self.why_not_recorded: str | None = None
        if pool.shape.device.type != "cuda":
            self.why_not_recorded = "only CUDA records passes"
        pool.before_resize = self.forget

    def shape_of(self, rows: Sequence[Row]) -> FixedShape | None:
        """The smallest shape that holds these rows; None where they are many, or are captured."""
        num_slots = _at_least(1, 1 + max(_slot(row).number for row in rows))
        num_queries = _at_least(1, max(row.num_queries for row in rows))
        if num_slots * num_queries > _MOST_QUERIES or any(row.captures for row in rows):
            return None
        columns = _at_least(_FEWEST_COLUMNS, max(row.stop for row in rows))
        return FixedShape(num_slots, num_queries, columns)

    def __call__(
        self,
        shape: FixedShape,
        rows: Sequence[Row],
        token_ids: Sequence[int] | Tensor,
        positions: Sequence[int],
    ) -> Tensor:
        """Final hidden states [N, H] of the rows' queries."""
        self._pool.make_room(max(row.stop for row in rows))
        is_first = shape not in self._passes
        if is_first:
            self._passes[shape] = _FixedPass(self._layers, self._pool, shape)
        wanted = self._passes[shape]
        wanted.fill(rows, token_ids, positions)
        if self.why_not_recorded is None and not is_first:
            self._record(wanted)
        if wanted.graph is None:
            output = wanted.run()
        else:
            assert wanted.output is not None
            wanted.graph.replay()
            output = wanted.output
        return wanted.hidden(output, len(positions))

    def forget(self) -> None:
        """Let go of what was recorded, and of the pool; it is recorded again when it is wanted."""
        if any(each.graph is not None for each in self._passes.values()):
            torch.cuda.current_stream(self._pool.shape.device).synchronize()  # it may be running
        self._passes.clear()
        self._memory = None

    def _record(self, wanted: "_FixedPass") -> None:
        """Record a pass, if it is to be; where that fails, none is from then on."""
        if wanted.graph is not None or not wanted.may_be_recorded:
            return
        device = self._pool.shape.device
        try:
            with _RECORDING, torch.cuda.device(device):
                if self._stream is None:
                    self._stream = torch.cuda.Stream()
                if self._memory is None:
                    self._memory = torch.cuda.graph_pool_handle()
                current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
                self._stream.wait_stream(current)
                with torch.cuda.stream(self._stream):
                    wanted.run()  # libraries take memory for this stream
                    # Other threads may be computing meanwhile.
                    with torch.cuda.graph(
                        graph,
                        pool=self._memory,
                        stream=self._stream,
                        capture_error_mode="thread_local",
                    ):
                        wanted.output = wanted.run()
                current.wait_stream(self._stream)
            wanted.graph = graph
        except torch.OutOfMemoryError:
            wanted.output, wanted.may_be_recorded = None, False
        except RuntimeError as error:
            self.why_not_recorded = (str(error).strip() or type(error).__name__).splitlines()[0]
            for each in self._passes.values():
                each.graph = each.output = None


class _FixedPass:
    """The inputs of one shape, which are written in place, and the pass as a function of them."""

    def __init__(self, layers: FusedLayers, pool: SlotPool, shape: FixedShape) -> None:
        self._layers, self._shape = layers, shape
        self._data, self._spare = pool.data, pool.capacity
        self._heads = pool.shape.num_kv_heads, pool.shape.head_dim
        device = pool.shape.device
        num_queries = shape.slots * shape.queries
        self._numbers = torch.zeros(4, num_queries, dtype=torch.int64, device=device)
        self._visible = torch.zeros(
            shape.slots, shape.queries, shape.columns, dtype=torch.bool, device=device
        )
        self._slots = torch.arange(shape.slots, device=device).repeat_interleave(shape.queries)
        self._turns = layers.turns(max(shape.columns, _FEWEST_POSITIONS))
        self._open = torch.zeros((), device=device)
        self._closed = torch.full_like(self._open, float("-inf"))
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Tensor | None = None  # of the graph
        self.may_be_recorded = True

    def fill(
        self, rows: Sequence[Row], token_ids: Sequence[int] | Tensor, positions: Sequence[int]
    ) -> None:
        """Write what the next run is to read: two copies, and one more for tokens on the device."""
        num_slots, num_queries, num_columns = self._shape
        numbers = np.zeros((4, num_slots * num_queries), dtype=np.int64)
        numbers[_COLUMNS] = self._spare
        # Who computes for no one sees the first column: to see none would come to no number.
        visible = np.zeros((num_slots, num_queries, num_columns), dtype=np.bool_)
        visible[:, :, 0] = True
        places: list[int] = []
        columns: list[int] = []
        for row in rows:
            number = _slot(row).number
            places += range(number * num_queries, number * num_queries + row.num_queries)
            columns += range(row.start, row.stop)
            see(row, visible[number, : row.num_queries, : row.stop])
        numbers[_PLACES, : len(places)] = places
        numbers[_POSITIONS, places] = positions
        numbers[_COLUMNS, places] = columns
        if not isinstance(token_ids, Tensor):
            numbers[_TOKENS, places] = token_ids
        send(numbers, self._numbers)
        send(visible, self._visible)
        if isinstance(token_ids, Tensor):
            self._numbers[_TOKENS].index_copy_(0, self._numbers[_PLACES, : len(places)], token_ids)

    def run(self) -> Tensor:
        """Hidden states [slots * queries, H]; keys and values go to their columns."""
        num_slots, num_queries, num_columns = self._shape
        num_kv_heads, dim = self._heads
        groups = self._layers.num_heads // num_kv_heads
        slots, columns = self._slots, self._numbers[_COLUMNS]
        # The heads of a group are further queries of their key head.
        bias = torch.where(self._visible, self._open, self._closed)[:, None, None]
        bias = bias.expand(num_slots, num_kv_heads, groups, num_queries, num_columns)
        bias = bias.reshape(num_slots * num_kv_heads, groups * num_queries, num_columns)

        def attend(layer: int, turned: Tensor, value: Tensor) -> Tensor:
            keys, values = self._data[layer].unbind(0)
            keys[slots, :, columns] = turned[:, -num_kv_heads:]
            values[slots, :, columns] = value
            queries = turned[:, :-num_kv_heads]
            queries = queries.view(num_slots, num_queries, num_kv_heads, groups, dim)
            output = attention(
                queries.permute(0, 2, 3, 1, 4).reshape(*bias.shape[:2], dim),
                keys[:num_slots, :, :num_columns].flatten(0, 1),
                values[:num_slots, :, :num_columns].flatten(0, 1),
                bias,
            )
            output = output.view(num_slots, num_kv_heads, groups, num_queries, dim)
            return output.permute(0, 3, 1, 2, 4).reshape(num_slots * num_queries, -1)

        turns = self._turns[self._numbers[_POSITIONS]]
        return self._layers.states(self._numbers[_TOKENS], turns, attend)

    def hidden(self, output: Tensor, count: int) -> Tensor:
        """A copy of what was computed for the rows' queries, in their order."""
        return output.index_select(0, self._numbers[_PLACES, :count])


def attention(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Attention [B, q, dim]; the scores, to which ``bias`` [B, q, columns] is added, in float32.

    Few queries over many columns: products share those out over the GPU, and fused attention, whose
    blocks are of queries, would leave most of it idle.
    """
    keys, scale = keys.transpose(1, 2), queries.shape[-1] ** -0.5
    if queries.dtype == torch.float32:
        scores = torch.baddbmm(bias, queries, keys, alpha=scale)
    elif queries.device.type == "cuda" and _ADDS_IN_FLOAT32:
        scores = torch.baddbmm(bias, queries, keys, out_dtype=torch.float32, alpha=scale)
    else:
        scores = torch.baddbmm(bias, queries.float(), keys.float(), alpha=scale)
    return torch.bmm(scores.softmax(-1).to(values.dtype), values)


def _at_least(fewest: int, count: int) -> int:
    """The next power of two."""
    return max(fewest, 1 << (count - 1).bit_length())


def _slot(row: Row) -> Slot:
    assert isinstance(row.buffer, Slot)
    return row.buffer

"""A context of llama.cpp: cells of keys and values, and the sequences that share them.

Knows token ids, positions and sequences, and no step. Cells are one pool for all sequences
("unified"): there a sequence is forked in part without copying, which elsewhere ends the process.
"""

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specguard.backends.llamacpp.library import Tensors, heard, key_of, library
from specguard.core.errors import SpecguardError

_WRITING, _WEIGHTS, _STATES = key_of("cache_k_"), key_of("kq_soft_"), key_of("result_n")
_NO_SLOT = 1  # what decoding returns where the cells do not suffice

Floats = NDArray[np.float32]
Cells = NDArray[np.int64]


@dataclass(slots=True)
class Microbatch:
    """Of the tokens that went through the graph together: by layer, [heads, tokens, cells]."""

    num_tokens: int
    weights: dict[int, Floats] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decoded:
    """Of a pass: logits [wanted, V] and states [wanted, H], the cell of each token, and weights.

    The logits are llama.cpp's own memory: they hold until the next pass.
    """

    logits: Floats
    hidden: Floats
    cells: Cells
    microbatches: list[Microbatch]


class _Watch:
    """Reads what a pass computes, in the callback that llama.cpp asks about every node."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._first_written: str | None = None
        self._is_checked = False
        self.error: BaseException | None = None
        self.begin(None)

    def begin(self, first_layer: int | None) -> None:
        """A pass, of which weights are kept from this layer on."""
        self.first_layer = first_layer
        self.cells: list[Cells] = []
        self.hidden: list[Floats] = []
        self.microbatches: list[Microbatch] = []
        self.error = None

    def __call__(self, tensor: int, is_asked: bool, _: Any) -> bool:
        key = self._tensors.key(tensor)
        if key not in (_WRITING, _WEIGHTS, _STATES):
            return False
        try:
            return self._asked(tensor, key) if is_asked else self._computed(tensor, key)
        except BaseException as error:  # which must not leave the callback
            self.error = error
            return not is_asked

    def _asked(self, tensor: int, key: int) -> bool:
        """Whether a node's numbers are wanted; where keys go is known before."""
        if key == _STATES:
            return self._tensors.name(tensor) == "result_norm"
        if key == _WEIGHTS:
            return self.first_layer is not None and self._layer(tensor) >= self.first_layer
        if self._tensors.is_written(tensor):
            name, target = self._tensors.name(tensor), self._tensors.source(tensor, 1)
            if not self._is_checked:
                self._tensors.check(tensor)
                self._is_checked = True
            if self._first_written in (None, name) and "k_idxs" in self._tensors.name(target):
                self._first_written = name
                cells = np.empty(self._tensors.shape(target)[0], dtype=np.int64)
                self._tensors.copy(target, cells)
                self.cells.append(cells)
                self.microbatches.append(Microbatch(len(cells)))
        return False

    def _computed(self, tensor: int, key: int) -> bool:
        width, rows, heads, _ = self._tensors.shape(tensor)
        if key == _STATES:
            states = np.empty((rows, width), dtype=np.float32)
            self._tensors.copy(tensor, states)
            self.hidden.append(states)
        else:
            weights = np.empty((heads, rows, width), dtype=np.float32)
            self._tensors.copy(tensor, weights)
            self.microbatches[-1].weights[self._layer(tensor)] = weights
        return True

    def _layer(self, tensor: int) -> int:
        return int(self._tensors.name(tensor).rpartition("-")[2])


class Context:
    """Cells for ``num_cells`` tokens, of which more are taken as they are needed.

    ``model`` makes llama.cpp's contexts; see `Model` in loading.
    """

    def __init__(self, model: Any, num_cells: int) -> None:
        self._model, self.num_cells = model, num_cells
        self._api = library()
        self._watch = _Watch(model.tensors)
        self._callback = self._api.ggml_backend_sched_eval_callback(self._watch)
        self._open()

    def copy(self, source: int, target: int, length: int) -> None:
        """Make a sequence that is empty begin as another one."""
        self._api.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def cut(self, sequence: int, length: int) -> None:
        """Forget what a sequence has from this position on."""
        self._api.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def decode(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[Sequence[int]],
        is_wanted: Sequence[bool],
        first_layer: int | None = None,
    ) -> Decoded:
        """Forward tokens [N], each for the sequences that go on with it.

        Raises:
            SpecguardError: memory ran out, or llama.cpp refuses.
        """
        self._watch.begin(first_layer)
        parts = []
        most = self._model.batch_size
        for start in range(0, len(token_ids), most):
            piece = slice(start, start + most)
            batch, keep = _batch(
                token_ids[piece], positions[piece], sequences[piece], is_wanted[piece]
            )
            code, reason = heard(self._api.llama_decode, self._pointer, batch)
            if self._watch.error is not None:
                raise self._watch.error
            del keep
            if code != 0:
                raise self._failure(code, reason)
            parts.append(self._logits(sum(map(bool, is_wanted[piece]))))
            if start + most < len(token_ids):
                parts[-1] = parts[-1].copy()
        cells = np.concatenate(self._watch.cells) if self._watch.cells else np.empty(0, np.int64)
        hidden = (
            np.concatenate(self._watch.hidden)
            if self._watch.hidden
            else np.empty((0, 0), dtype=np.float32)
        )
        logits = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if len(hidden) != len(logits) or len(cells) != len(token_ids):
            raise SpecguardError(
                f"llama.cpp shows {len(hidden)} states of {len(logits)}, and the cells of "
                f"{len(cells)} tokens of {len(token_ids)}",
                "use a release of llama-cpp-python that has been run: see docs/engines.md",
            )
        return Decoded(logits, hidden, cells, self._watch.microbatches)

    def grow(self, num_cells: int) -> None:
        """Take more cells. Those in use keep their order and become the first ones."""
        api, old = self._api, self._close
        content = np.empty(api.llama_state_get_size(self._pointer), dtype=np.uint8)
        place = content.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        num_bytes = api.llama_state_get_data(self._pointer, place, len(content))
        self.num_cells = num_cells
        self._open()
        old()
        if api.llama_state_set_data(self._pointer, place, num_bytes) != num_bytes:
            raise SpecguardError("llama.cpp does not read what it has kept itself")

    def _logits(self, count: int) -> Floats:
        if not count:
            return np.empty((0, self._model.num_logits), dtype=np.float32)
        pointer = self._api.llama_get_logits(self._pointer)
        return np.ctypeslib.as_array(pointer, (count, self._model.num_logits))

    def _open(self) -> None:
        self._pointer = self._model.new_context(self.num_cells, self._callback)
        self._memory = self._api.llama_get_memory(self._pointer)
        self._close = weakref.finalize(self, self._api.llama_free, self._pointer)

    def _failure(self, code: int, reason: str) -> SpecguardError:
        return SpecguardError(f"llama.cpp cannot go on: {reason or f'error {code}'}")


def _batch(
    token_ids: Sequence[int],
    positions: Sequence[int],
    sequences: Sequence[Sequence[int]],
    is_wanted: Sequence[bool],
) -> tuple[Any, Any]:
    """A batch for llama.cpp, and the arrays that it points into."""
    api = library()
    counts = np.array([len(each) for each in sequences], dtype=np.int32)
    flat = np.array([number for each in sequences for number in each], dtype=np.int32)
    starts = flat.ctypes.data + 4 * (np.cumsum(counts, dtype=np.uint64) - counts.astype(np.uint64))
    arrays: list[NDArray[Any]] = [
        np.array(token_ids, dtype=np.int32),
        np.array(positions, dtype=np.int32),
        counts,
        starts.astype(np.uint64),
        np.array(is_wanted, dtype=np.int8),
    ]
    kinds = [kind for name, kind in api.llama_batch._fields_ if name not in ("n_tokens", "embd")]
    fields = [
        ctypes.cast(array.ctypes.data, kind) for array, kind in zip(arrays, kinds, strict=True)
    ]
    token, pos, n_seq_id, seq_id, logits = fields
    batch = api.llama_batch(len(counts), token, None, pos, n_seq_id, seq_id, logits)
    return batch, (flat, arrays)

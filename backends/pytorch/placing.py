"""The rows of a pass as a device takes them: masks, captures, and numbers as tensors."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specguard.backends.local.layer import Row, RowCapture
from specguard.backends.pytorch.attention import DeviceCapture, PlacedRow
from specguard.backends.pytorch.kv import KVBuffer


def tensor_on(device: torch.device, values: Sequence[int] | NDArray[np.generic]) -> Tensor:
    """Numbers as a tensor, without waiting for the device, which is to compute meanwhile."""
    return _pinned(values, device).to(device, non_blocking=True)


def send(values: NDArray[np.generic], tensor: Tensor) -> None:
    """Write numbers into a tensor, likewise."""
    tensor.copy_(_pinned(values, tensor.device), non_blocking=True)


def _pinned(values: Sequence[int] | NDArray[np.generic], device: torch.device) -> Tensor:
    """Numbers in memory that CUDA copies from by itself: from other memory it does only a few."""
    tensor = torch.from_numpy(np.asarray(values))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def buffer_of(row: Row) -> KVBuffer:
    """The row's buffer, which is one of this backend."""
    assert isinstance(row.buffer, KVBuffer)
    return row.buffer


def is_range(numbers: Sequence[int]) -> bool:
    """Whether they are 0, 1, 2, ..."""
    return all(number == place for place, number in enumerate(numbers))


def see(row: Row, visible: NDArray[np.bool_]) -> None:
    """Write what a row's queries see, [queries, columns up to the last new one]."""
    if row.visible is None:
        visible[:, : row.start] = True
        visible[:, row.start :] = np.tri(row.num_queries, dtype=np.bool_)
    else:
        visible[:, : row.base] = True
        visible[:, row.base :] = row.visible


class Placing:
    """Places rows for a model of ``num_layers`` that computes in ``number_type``.

    A mask is 0 where a query may look and ``closed`` elsewhere.
    """

    def __init__(
        self, device: torch.device, num_layers: int, number_type: torch.dtype, closed: float
    ) -> None:
        self._device, self._num_layers = device, num_layers
        self._open = torch.zeros((), dtype=number_type, device=device)
        self._closed = torch.full_like(self._open, closed)

    def place(self, rows: Sequence[Row]) -> list[PlacedRow]:
        """The rows of one pass, whose queries lie one after the other."""
        placed = []
        stop = 0
        for row in rows:
            first, stop = stop, stop + row.num_queries
            captures = [self._capture(capture) for capture in row.captures]
            one = PlacedRow(row, buffer_of(row), slice(first, stop), None, captures)
            if not one.is_causal and not (row.visible is None and row.num_queries == 1):
                one.mask = self.mask(row)
            placed.append(one)
        return placed

    def mask(self, row: Row) -> Tensor:
        """What is added to a row's scores, [1, 1, queries, columns]."""
        seen = np.empty((row.num_queries, row.stop), dtype=np.bool_)
        see(row, seen)
        return torch.where(tensor_on(self._device, seen), self._open, self._closed)[None, None]

    def _capture(self, capture: RowCapture) -> DeviceCapture:
        wanted = capture.capture
        source = tensor_on(self._device, wanted.is_source).float()
        return DeviceCapture(
            capture,
            self._slice_or_tensor(capture.queries),
            self._slice_or_tensor(capture.columns),
            source,
            1 - source,
            self._num_layers - wanted.num_layers,
        )

    def _slice_or_tensor(self, places: list[int]) -> Tensor | slice:
        first, stop = places[0], places[-1] + 1
        if stop - first == len(places):  # ascending, as they are
            return slice(first, stop)
        return tensor_on(self._device, places)

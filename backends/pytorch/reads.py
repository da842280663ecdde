"""Numbers on their way from a GPU, which computes on meanwhile."""

from collections import deque

import torch
from torch import Tensor

_MOST_BEGUN = 8


class LateReads:
    """Copies that begin when a tensor is computed, and are looked at one pass later.

    A copy that began only then would wait for the pass, which was launched before it. On a CPU, and
    on Metal, nothing begins before it is wanted.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._begun: deque[tuple[Tensor, Tensor, torch.cuda.Event]] = deque(maxlen=_MOST_BEGUN)

    def begin(self, tensor: Tensor) -> None:
        """Begin to copy."""
        if self._is_cuda:
            copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
            copy.copy_(tensor, non_blocking=True)
            arrival = torch.cuda.Event()
            arrival.record(torch.cuda.current_stream(tensor.device))
            self._begun.append((tensor, copy, arrival))

    def end(self, tensor: Tensor) -> Tensor:
        """The tensor on the CPU, once it is there."""
        for number, (begun, copy, arrival) in enumerate(self._begun):
            if begun is tensor:
                del self._begun[number]
                arrival.synchronize()
                return copy
        return tensor.cpu()

"""A weight, and the product that suits the processor, the number type and the count of rows."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

_GROUP = 32  # weights of a row that share a scale and an offset
_MOST_PACKED_ROWS = 4  # beyond, unpacking costs more than reading
_HIGHEST = 15  # of 4 bits
PACKED_BYTES = 0.5 + 2 * 2 / _GROUP  # of a weight, scale and offset included
_PACKED_OUTPUTS = 64  # the kernel's tile
_EXACT_ROWS = 8
_HALF_ERROR = 2.0**-20  # of a weight, as a share of the largest one
_HALF_STEP = 2.0**-25  # half precision is off by that at most, of bfloat16 below 2**16
_MOST_COMPARED_ROWS = 1024
_HALF_ENGINES = "x86", "fbgemm"  # whose kernels read halves and compute in single precision


class Matrix:
    """A weight [outputs, inputs] and its bias [outputs].

    ``is_packed`` rounds the weight, in place, to 4 bits with a scale and an offset for each group
    of 32 inputs, and keeps it in that form, too: passes over few rows read a third of the bytes,
    passes over many multiply by the same rounded numbers in bfloat16. A weight that the kernel has
    no form for stays as it is. ``owners`` are parameters that share the weight's memory.
    """

    __slots__ = ("_blocked", "_halved", "_owners", "_packed", "bias", "weight")

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        is_packed: bool = False,
        owners: Sequence[Tensor] = (),
    ) -> None:
        self.weight, self.bias, self._owners = weight, bias, owners
        fits = weight.shape[0] % _PACKED_OUTPUTS == 0 and weight.shape[1] % _GROUP == 0
        self._packed = _round_and_pack(weight) if is_packed and fits else None
        self._blocked: Tensor | None = None
        self._halved: torch.ScriptObject | None = None

    def lay_out(self, number_type: torch.dtype) -> bool:
        """Lay the weight out for products in ``number_type``; whether anything changed.

        In bfloat16 as oneDNN multiplies by it: else it would be laid out anew in each product,
        which for a few rows takes as long as the product itself. In single precision in halves,
        where that loses nothing: half as many bytes are read, and products stay single. What owned
        the weight holds none then.
        """
        if self.bias is not None:
            self.bias = self.bias.to(number_type)
        if number_type == torch.bfloat16 and _can_block(self.weight):
            self._blocked = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)
        elif number_type == torch.float32 and _fits_halves(self.weight):
            self._halved = torch.ops.quantized.linear_prepack_fp16(self.weight.float(), None)
        elif self.weight.dtype == number_type:
            return False
        self.weight = (
            self.weight.to(number_type)
            if self._blocked is None and self._halved is None
            else self.weight.new_empty(0)
        )
        for owner in self._owners:
            owner.data = self.weight.new_empty(0)
        return True

    def __call__(self, inputs: Tensor, added: Tensor | None = None) -> Tensor:
        """Inputs [N, I] times the weight, plus the bias, plus ``added`` [N, O]: [N, O]."""
        if added is not None and self.bias is not None:
            return self._product(inputs, added).add_(self.bias)
        return self._product(inputs, self.bias if added is None else added)

    def _product(self, inputs: Tensor, added: Tensor | None) -> Tensor:
        """The product plus ``added`` [O] or [N, O], in any layout."""
        found: Tensor
        if self._packed is not None and len(inputs) <= _MOST_PACKED_ROWS:
            found = torch.ops.aten._weight_int4pack_mm_for_cpu(
                inputs.contiguous(), self._packed[0], _GROUP, self._packed[1]
            )
            return found if added is None else found.add_(added)
        if self._halved is not None:
            found = torch.ops.quantized.linear_dynamic_fp16(inputs, self._halved)
            return found if added is None else found.add_(added)
        if self._blocked is not None:
            num_rows = len(inputs)
            num_padded = _padded(num_rows) - num_rows
            if num_padded:
                inputs = functional.pad(inputs, (0, 0, 0, num_padded))
            multiply = torch.ops.mkldnn._linear_pointwise
            if added is not None and added.dim() == 2:
                added = functional.pad(added, (0, 0, 0, num_padded)) if num_padded else added
                found = multiply.binary(inputs, added, self._blocked, None, "add")
            else:
                found = multiply(inputs, self._blocked, added, "none", [], "")
            return found[:num_rows]
        weight = self.weight.t()
        return torch.mm(inputs, weight) if added is None else torch.addmm(added, inputs, weight)


def _padded(num_rows: int) -> int:
    """Up to 8 rows as they are, beyond one of four counts in each octave.

    oneDNN keeps code and memory for each count that it has met: megabytes a matrix.
    """
    if num_rows <= _EXACT_ROWS:
        return num_rows
    step = 1 << max(1, (num_rows - 1).bit_length() - 3)
    return -(-num_rows // step) * step


def _can_block(weight: Tensor) -> bool:
    """Whether oneDNN multiplies by it, in bfloat16."""
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def reads_halves() -> bool:
    """Whether a kernel multiplies in single precision by weights in half precision."""
    return torch.backends.quantized.engine in _HALF_ENGINES and hasattr(
        torch.ops.quantized, "linear_prepack_fp16"
    )


def _fits_halves(weight: Tensor) -> bool:
    """Whether half precision holds it as it is: it was bfloat16 or half before.

    Of bfloat16 it holds all that is not below 2**-14, and that to within 2**-25: less than what
    rounding in a product comes to.
    """
    if weight.device.type != "cpu" or not reads_halves():
        return False
    largest = max(abs(float(bound)) for bound in torch.aminmax(weight))
    if weight.dtype == torch.bfloat16 and _HALF_STEP <= _HALF_ERROR * largest < _HALF_ERROR * 2**16:
        return True  # without a look at each
    # The whole in single precision would take much memory at once.
    parts = (part.float() for part in weight.split(_MOST_COMPARED_ROWS))
    return all(
        bool((part.half().float() - part).abs().max() <= _HALF_ERROR * largest) for part in parts
    )


def _round_and_pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight in place; its packed levels, and scales and offsets [groups, outputs, 2]."""
    groups = weight.float().unflatten(1, (-1, _GROUP))
    lowest, highest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    middle = (_HIGHEST + 1) // 2  # the kernel's level of which the offset is the number
    scale = ((highest - lowest) / _HIGHEST).clamp_(min=1e-8).to(weight.dtype).float()
    offset = (lowest + middle * scale).to(weight.dtype).float()
    levels = ((groups - offset) / scale + middle).round_().clamp_(0, _HIGHEST)
    weight.copy_(((levels - middle) * scale + offset).flatten(1))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.flatten(1).int(), 1)
    pairs = torch.cat([scale, offset], -1).transpose(0, 1).to(weight.dtype).contiguous()
    return packed, pairs

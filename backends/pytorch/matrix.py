"""A weight, and the product that suits the processor, the number type and the count of rows."""

import torch
from torch import Tensor

_FEW_ROWS = 64  # whose product with a matrix takes little longer than reading the matrix
_HAS_AMX = torch.cpu._is_amx_tile_supported()
_GROUP = 32  # weights of a row that share a scale and an offset
_MOST_PACKED_ROWS = 4  # beyond, unpacking costs more than reading
_HIGHEST = 15  # of 4 bits
PACKED_BYTES = 0.5 + 2 * 2 / _GROUP  # of a weight, scale and offset included
_PACKED_OUTPUTS = 64  # the kernel's tile


class Matrix:
    """A weight [outputs, inputs] and its bias [outputs].

    ``is_packed`` rounds the weight, in place, to 4 bits with a scale and an offset for each group
    of 32 inputs, and keeps it in that form, too: passes over few rows read a third of the bytes,
    passes over many multiply by the same rounded numbers in bfloat16. A weight that the kernel has
    no form for stays as it is.
    """

    __slots__ = ("_packed", "bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, is_packed: bool = False) -> None:
        self.weight, self.bias = weight, bias
        fits = weight.shape[0] % _PACKED_OUTPUTS == 0 and weight.shape[1] % _GROUP == 0
        self._packed = _round_and_pack(weight) if is_packed and fits else None

    def __call__(self, inputs: Tensor, added: Tensor | None = None) -> Tensor:
        """Inputs [N, I] times the weight, plus the bias, plus ``added`` [N, O]: [N, O]."""
        if added is not None and self.bias is not None:
            return self._product(inputs, added).add_(self.bias)
        return self._product(inputs, self.bias if added is None else added)

    def _product(self, inputs: Tensor, added: Tensor | None) -> Tensor:
        """The product plus ``added`` [O] or [N, O], in any layout."""
        weight = self.weight
        if self._packed is not None and len(inputs) <= _MOST_PACKED_ROWS:
            found: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
                inputs.contiguous(), self._packed[0], _GROUP, self._packed[1]
            )
            return found if added is None else found.add_(added)
        if not _HAS_AMX or inputs.dtype == torch.float32 or len(inputs) > _FEW_ROWS:
            weight = weight.t()
            return torch.mm(inputs, weight) if added is None else torch.addmm(added, inputs, weight)
        # For AMX the right factor is packed anew in each product: it must not be the weight.
        if len(inputs) == 1:
            vector = inputs[0]
            if added is None:
                return torch.mv(weight, vector).unsqueeze(0)
            return torch.addmv(added.view(-1), weight, vector).unsqueeze(0)
        if added is None:
            return torch.mm(weight, inputs.t()).t()
        columns = added.unsqueeze(1) if added.dim() == 1 else added.t()
        return torch.addmm(columns, weight, inputs.t()).t()


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

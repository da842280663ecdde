"""The passes of a Llama, Qwen2 or Qwen3 without transformers' layers: plain matrix products.

The Python and the launches of an eager pass cost more than the arithmetic of a small model. Used
where a model passes the comparison with its own layers at load. Norms are computed in single
precision, as transformers does.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from specguard.backends.pytorch.attention import PlacedRow, attend_row
from specguard.backends.pytorch.matrix import Matrix
from specguard.core.reference import is_reference

_FUSED = LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
_DEVICES = "cpu", "cuda"
_NUMBER_TYPES = {torch.float32, torch.bfloat16, torch.float16}
_ROPE_TYPES = ("default", "linear", "llama3")
_FIRST_POSITIONS = 512


# Attention of a pass: from the layer's number, queries and keys [N, heads + kv_heads, head_dim], of
# which positions have turned, and values [N, kv_heads, head_dim], to the output [N, heads * dim].
Attend = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Norm:
    """An RMS norm's weight [..., width], and what a CPU multiplies by: ``gain``, in float32.

    ``gain`` is times, ``floor`` with the root of the width.
    """

    weight: Tensor
    epsilon: float
    gain: Tensor
    floor: Tensor


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights, those with the same input in one.

    ``head_norm`` is of the queries and keys, if these are normed (Qwen3), head by head.
    """

    input_norm: _Norm
    qkv: Matrix
    head_norm: _Norm | None
    out: Matrix
    post_norm: _Norm
    gate_up: Matrix
    down: Matrix


class FusedLayers:
    """The layers of a model as a function, if `why_not_fused` knows no reason against it.

    ``is_packed`` rounds the model's matrices to 4 bits, its own as well (`Matrix`).
    """

    def __init__(self, model: PreTrainedModel, is_packed: bool = False) -> None:
        config = model.config
        self._base: Any = model.base_model
        self.num_heads = int(config.num_attention_heads)
        self.num_kv_heads = int(config.num_key_value_heads)
        self.head_dim = int(
            getattr(config, "head_dim", None) or config.hidden_size // self.num_heads
        )
        self._number_type = model.dtype
        self._norm = _norm(self._base.norm)
        self._layers = [
            _fuse(layer, self.num_heads, self.num_kv_heads, is_packed)
            for layer in self._base.layers
        ]
        head: Any = model.get_output_embeddings()
        is_tied = head.weight is self._base.embed_tokens.weight
        self._head = Matrix(
            head.weight.data, head.bias, is_packed, owners=() if is_tied else (head.weight,)
        )
        self._turns = torch.empty(0)  # [positions, 2, 1, head_dim], grows with the positions

    def take_over(self, number_type: torch.dtype) -> bool:
        """Compute in ``number_type`` from now on, with weights laid out for that where it pays.

        The model's own layers lose those. Whether anything changed.
        """
        self._number_type = number_type
        self._turns = torch.empty(0)
        matrices = [self._head]
        for layer in self._layers:
            matrices += [layer.qkv, layer.out, layer.gate_up, layer.down]
        # Making halves is slow, and runs in one thread; oneDNN shares its work out by itself.
        num_threads = torch.get_num_threads() if number_type == torch.float32 else 1
        with ThreadPoolExecutor(num_threads) as threads:
            are_laid_out = list(threads.map(partial(_lay_out, number_type), matrices))
        return any(are_laid_out)

    def __call__(
        self, tokens: Tensor, positions: Tensor, end: int, rows: Sequence[PlacedRow]
    ) -> Tensor:
        """Final hidden states [N, H] of tokens [N], whose positions lie before ``end``.

        Their columns go to the rows' buffers.
        """
        scale = self.head_dim**-0.5

        def attend(layer: int, turned: Tensor, value: Tensor) -> Tensor:
            outputs = []
            for placed in rows:
                own = turned[placed.queries].transpose(0, 1)
                query, key = own[: self.num_heads], own[self.num_heads :]
                values = value[placed.queries].transpose(0, 1)
                outputs.append(attend_row(layer, query, key, values, scale, placed))
            output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
            return output.view(len(tokens), -1)

        return self.states(tokens, self.turns(end)[positions], attend)

    def states(self, tokens: Tensor, turns: Tensor, attend: Attend) -> Tensor:
        """Final hidden states [N, H] of tokens [N], with attention from elsewhere.

        ``turns`` [N, 2, 1, head_dim] are of their positions.
        """
        cos, sin = turns.unbind(1)
        # Rows of a matrix throughout: products of more dimensions are slower to set up.
        embedded = functional.embedding(tokens, self._base.embed_tokens.weight)
        states = embedded.to(self._number_type)
        for index, layer in enumerate(self._layers):
            heads = layer.qkv(_normed(states, layer.input_norm)).contiguous()
            heads = heads.view(len(tokens), -1, self.head_dim)
            turning, value = heads[:, : -self.num_kv_heads], heads[:, -self.num_kv_heads :]
            if layer.head_norm is not None:
                turning = _normed(turning, layer.head_norm)
            states = layer.out(attend(index, _rotate(turning, cos, sin), value), states)
            gate, up = layer.gate_up(_normed(states, layer.post_norm)).chunk(2, -1)
            states = layer.down(functional.silu(gate).mul_(up), states)
        return _normed(states, self._norm).contiguous()

    def logits(self, hidden: Tensor) -> Tensor:
        """What the head makes of final hidden states; without the hooks of a module's call."""
        return self._head(hidden).contiguous()

    def turns(self, end: int) -> Tensor:
        """Cosines and signed sines [positions, 2, 1, head_dim] of positions up to ``end``.

        A tensor that was handed over stays as it is.
        """
        if end > len(self._turns):
            count = max(_FIRST_POSITIONS, 2 * end)
            places = torch.arange(count, device=self._norm.weight.device)[None]
            kind = torch.empty(0, dtype=self._number_type, device=places.device)
            cos, sin = self._base.rotary_emb(kind, places)
            sin[..., : sin.shape[-1] // 2] *= -1
            self._turns = torch.stack([cos[0], sin[0]], 1).unsqueeze(2)
        return self._turns


def why_not_fused(model: PreTrainedModel) -> str | None:
    """Why a model cannot be run by fused layers, or None."""
    if is_reference():
        return "the reference switch is on"
    if type(model) not in _FUSED:
        return f"fused layers know Llama, Qwen2 and Qwen3, and this is {type(model).__name__}"
    reason = why_config_not_fused(model.config.to_dict())
    if reason is not None:
        return reason
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if model.device.type not in _DEVICES or len(dtypes) > 1 or not dtypes <= _NUMBER_TYPES:
        return "fused layers compute in float32, bfloat16 or float16 on a CPU or with CUDA"
    modules = [
        module
        for layer in model.base_model.layers
        for name, module in (*layer.self_attn.named_children(), *layer.mlp.named_children())
        if getattr(module, "weight", None) is not None and name not in ("q_norm", "k_norm")
    ]
    if any(type(module) is not nn.Linear for module in (*modules, model.get_output_embeddings())):
        return "its matrices are no plain linear modules"
    return None


def why_config_not_fused(config: Mapping[str, Any]) -> str | None:
    """The same by a config alone."""
    if config.get("model_type") not in [kind.config_class.model_type for kind in _FUSED]:
        return f"fused layers do not know {config.get('model_type')} models"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    layer_types = config.get("layer_types") or ["full_attention"]
    if not isinstance(rope, Mapping) or not isinstance(layer_types, list):
        return "its config is of another form"  # which is for transformers to refuse
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _ROPE_TYPES:
        return f"fused layers do not know {kind} positions"
    if any(each != "full_attention" for each in layer_types) or config.get("hidden_act") != "silu":
        return "fused layers have full attention and SiLU throughout"
    return None


def _lay_out(number_type: torch.dtype, matrix: Matrix) -> bool:
    with torch.inference_mode():  # which a thread has for itself
        return matrix.lay_out(number_type)


def _fuse(layer: Any, num_heads: int, num_kv_heads: int, is_packed: bool) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    head_norm = None
    if hasattr(attention, "q_norm"):
        norms = [attention.q_norm] * num_heads + [attention.k_norm] * num_kv_heads
        head_norm = _norm(*norms)
    return _Layer(
        _norm(layer.input_layernorm),
        _fused(is_packed, attention.q_proj, attention.k_proj, attention.v_proj),
        head_norm,
        _fused(is_packed, attention.o_proj),
        _norm(layer.post_attention_layernorm),
        _fused(is_packed, mlp.gate_proj, mlp.up_proj),
        _fused(is_packed, mlp.down_proj),
    )


def _fused(is_packed: bool, *modules: nn.Linear) -> Matrix:
    """Weights and biases one after the other."""
    biases = [module.bias for module in modules if module.bias is not None]
    weights = [module.weight for module in modules]
    bias = _joined(biases) if biases else None
    return Matrix(_joined(weights), bias, is_packed, owners=weights)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One tensor; the parts become views of it, so that nothing is held twice."""
    if len(parts) == 1:
        return parts[0].data
    whole = torch.cat([part.data for part in parts])
    for part, piece in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = piece
    return whole


def _norm(*modules: Any) -> _Norm:
    """The norm of a module, or of several, each for a head of its own."""
    weights = [module.weight.data for module in modules]
    weight = weights[0] if len(weights) == 1 else torch.stack(weights)
    width = weight.shape[-1]
    epsilon = float(modules[0].variance_epsilon)
    floor = torch.tensor((width * epsilon) ** 0.5)
    return _Norm(weight, epsilon, weight.float() * width**0.5, floor)


def _normed(states: Tensor, norm: _Norm) -> Tensor:
    """RMS norm."""
    if states.device.type != "cpu":
        return _normed_at_once(states, norm)
    # Half the time of torch's own.
    wide = states.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / torch.hypot(length, norm.floor)).mul_(norm.gain).to(states.dtype)


def _normed_at_once(states: Tensor, norm: _Norm) -> Tensor:
    """The same where each operation is a launch."""
    if norm.weight.dim() == 1:
        return functional.rms_norm(states, norm.weight.shape, norm.weight, norm.epsilon)
    return functional.rms_norm(states, states.shape[-1:], None, norm.epsilon) * norm.weight


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions; ``sin`` with the sign that its half of the dimensions takes."""
    half = states.shape[-1] // 2
    turned = torch.cat([states[..., half:], states[..., :half]], -1)
    return torch.addcmul(states * cos, turned, sin)

"""The passes of a Llama or Qwen2 without transformers' layers around them: plain matrix products.

On a CPU, the Python of an eager pass costs more than the arithmetic of a small model. Used in
single precision on the CPU, where a model passes the comparison with its own layers at load.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from specguard.backends.pytorch.attention import AttentionPass, attend
from specguard.backends.pytorch.kv import KVBuffer
from specguard.core.shortcuts import uses

_ROPE_TYPES = ("default", "linear", "llama3")
_FIRST_POSITIONS = 512


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights, those with the same input in one; it stands for the module, too.

    Matrices are [inputs, outputs].
    """

    layer_idx: int
    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class LeanLayers:
    """The layers of a model as a function. Make one with `lean_layers`."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        self._base: Any = model.base_model
        self._num_heads = int(config.num_attention_heads)
        self._num_kv_heads = int(config.num_key_value_heads)
        self._head_dim = int(
            getattr(config, "head_dim", None) or config.hidden_size // self._num_heads
        )
        width = int(config.hidden_size)
        self._floor = torch.tensor((width * float(config.rms_norm_eps)) ** 0.5)
        self._norm = self._base.norm.weight.data * width**0.5
        self._layers = [_fuse(index, layer) for index, layer in enumerate(self._base.layers)]
        self._head = model.get_output_embeddings()
        self._turns = torch.empty(0)  # [positions, 2, 1, head_dim], grows with the positions

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        buffer: KVBuffer,
        start: int,
        attention: AttentionPass,
    ) -> Tensor:
        """Final hidden states [B, q, H] of tokens [B, q]; their columns go to the buffer."""
        batch, length = tokens.shape
        # No position lies behind its column.
        cos, sin = self._rotation(positions, start + length)
        num_rotated = self._num_heads + self._num_kv_heads
        # Rows of a matrix from here on: products of more dimensions are slower to set up.
        states = functional.embedding(tokens.flatten(), self._base.embed_tokens.weight)
        for layer in self._layers:
            heads = _product(self._normed(states, layer.input_norm), layer.qkv, layer.qkv_bias)
            heads = heads.view(batch, length, -1, self._head_dim)
            rotated = _rotate(heads[:, :, :num_rotated], cos, sin).transpose(1, 2)
            key, value = buffer.write(
                layer.layer_idx,
                start,
                rotated[:, self._num_heads :],
                heads[:, :, num_rotated:].transpose(1, 2),
            )
            output, _ = attend(
                layer,  # type: ignore[arg-type]
                rotated[:, : self._num_heads],
                key,
                value,
                None,
                scaling=self._head_dim**-0.5,
                attention_pass=attention,
            )
            states = torch.addmm(states, output.view(batch * length, -1), layer.out)
            if layer.out_bias is not None:
                states += layer.out_bias
            inputs = self._normed(states, layer.post_norm)
            gate, up = _product(inputs, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
            states = torch.addmm(states, functional.silu(gate).mul_(up), layer.down)
            if layer.down_bias is not None:
                states += layer.down_bias
        return self._normed(states, self._norm).view(batch, length, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """What the head makes of final hidden states; without the hooks of a module's call."""
        return functional.linear(hidden, self._head.weight, self._head.bias)

    def _normed(self, states: Tensor, gain: Tensor) -> Tensor:
        """RMS norm; ``gain`` is times the root of the width. Half the time of torch's own."""
        length = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        return (states / torch.hypot(length, self._floor)).mul_(gain)

    def _rotation(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [B, q, 1, head_dim] of positions before ``end``."""
        if end > len(self._turns):
            count = max(_FIRST_POSITIONS, 2 * end)
            places = torch.arange(count, device=positions.device)[None]
            cos, sin = self._base.rotary_emb(self._base.norm.weight, places)
            sin[..., : sin.shape[-1] // 2] *= -1
            self._turns = torch.stack([cos[0], sin[0]], 1).unsqueeze(2)
        cos, sin = self._turns[positions].unbind(2)
        return cos, sin


def lean_layers(model: PreTrainedModel) -> LeanLayers | None:
    """The lean layers of a model that can have them, else None."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    is_plain = (
        uses("lean")
        and type(model) in (LlamaForCausalLM, Qwen2ForCausalLM)
        and model.device.type == "cpu"
        and {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        and rope.get("rope_type", "default") in _ROPE_TYPES
        and layer_types == {"full_attention"}
        and config.hidden_act == "silu"
        and type(model.get_output_embeddings()) is nn.Linear
        and all(
            type(module) is nn.Linear
            for layer in model.base_model.layers
            for module in (*layer.self_attn.children(), *layer.mlp.children())
            if getattr(module, "weight", None) is not None
        )
    )
    return LeanLayers(model) if is_plain else None


def _fuse(index: int, layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    root = len(layer.input_layernorm.weight) ** 0.5
    qkv, qkv_bias = _fused(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, gate_up_bias = _fused(mlp.gate_proj, mlp.up_proj)
    return _Layer(
        index,
        layer.input_layernorm.weight.data * root,
        qkv.t(),
        qkv_bias,
        attention.o_proj.weight.data.t(),
        attention.o_proj.bias,
        layer.post_attention_layernorm.weight.data * root,
        gate_up.t(),
        gate_up_bias,
        mlp.down_proj.weight.data.t(),
        mlp.down_proj.bias,
    )


def _fused(*modules: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weights and biases one after the other."""
    biases = [module.bias for module in modules if module.bias is not None]
    return _joined([module.weight for module in modules]), _joined(biases) if biases else None


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One tensor; the parts become views of it, so that nothing is held twice."""
    whole = torch.cat([part.data for part in parts])
    for part, piece in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = piece
    return whole


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(inputs, weight) if bias is None else torch.addmm(bias, inputs, weight)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions; ``sin`` with the sign that its half of the dimensions takes."""
    half = states.shape[-1] // 2
    turned = torch.cat([states[..., half:], states[..., :half]], -1)
    return torch.addcmul(states * cos, turned, sin)

"""The network that is trained: a Llama whose token vectors are sums, for words never trained on.

A token's vector is that of its class (name behind a space, digit, ...) plus that of its word. The
words of names and things are random codes that stay as they are, so a name held out from training
is to the network what the names in training are. Exported, this is a plain Llama.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from recipes.tiny.lexicon import Lexicon


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a network; key/value heads are as many as query heads."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    rope_theta: float = 1e8
    rms_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_heads

    def as_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return asdict(self)


class Layer(nn.Module):
    """A Llama layer with biases in its attention; names as in transformers."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, m = shape.hidden_size, shape.intermediate_size
        self.num_heads, self.eps = shape.num_heads, shape.rms_norm_eps
        self.input_layernorm = nn.Parameter(torch.ones(d))
        self.post_attention_layernorm = nn.Parameter(torch.ones(d))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(d, d) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(d, m, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(m, d, bias=False)

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor, int] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """``x`` [B, T, D]; a cache holds keys and values [B, H, capacity, D / H], and their end."""
        batch, length, width = x.shape
        normed = norm(x, self.input_layernorm, self.eps)
        shape = (batch, length, self.num_heads, width // self.num_heads)
        q, k, v = (
            projection(normed).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is None:
            mixed = attend(q, k, v)
        else:
            keys, values, start = cache
            keys[:, :, start : start + length] = k
            values[:, :, start : start + length] = v
            end = start + length
            mixed = functional.scaled_dot_product_attention(
                q, keys[:, :, :end], values[:, :, :end], attn_mask=mask
            )
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        normed = norm(x, self.post_attention_layernorm, self.eps)
        inner = functional.silu(self.gate_proj(normed)) * self.up_proj(normed)
        added: Tensor = x + self.down_proj(inner)
        return added


def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension."""
    return functional.rms_norm(x, x.shape[-1:], gain.to(x.dtype), eps)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over [B, H, T, K]."""
    if q.device.type != "cpu":
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    # On a CPU the fused backward pass takes twice as long as this at these lengths.
    batch, heads, length, size = q.shape
    hidden = torch.full((length, length), -1e4, dtype=q.dtype).triu(1)
    q, k, v = (part.reshape(batch * heads, length, size) for part in (q * size**-0.5, k, v))
    scores = torch.baddbmm(hidden.expand(batch * heads, -1, -1), q, k.transpose(1, 2))
    return torch.bmm(scores.softmax(-1), v).view(batch, heads, length, size)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions as in transformers: ``x`` [B, H, T, K], ``cos`` and ``sin`` [T, K]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Network(nn.Module):
    """Token ids [B, T] to hidden states [B, T, D]; see the module for the token vectors."""

    class_of: Tensor
    word_of: Tensor
    learns: Tensor
    is_unused: Tensor
    code_in: Tensor
    code_out: Tensor

    def __init__(self, shape: Shape, lexicon: Lexicon) -> None:
        super().__init__()
        self.shape = shape
        d = shape.hidden_size
        num_classes, num_words = lexicon.num_classes, lexicon.num_words
        for side in ("in", "out"):
            for kind, count in (("class", num_classes), ("word", num_words)):
                parameter = nn.Parameter(torch.zeros(count, d))
                self.register_parameter(f"{kind}_{side}", parameter)
            self.register_buffer(f"code_{side}", torch.zeros(num_words, d))
        self.register_buffer("class_of", torch.tensor(lexicon.class_of), persistent=False)
        self.register_buffer("word_of", torch.tensor(lexicon.word_of), persistent=False)
        is_fixed = torch.tensor(lexicon.is_fixed)
        self.register_buffer("learns", (~is_fixed).float()[:, None], persistent=False)
        # Tokens that training must not push down: nothing in it ever asks for them.
        self.register_buffer("is_unused", torch.tensor(lexicon.is_unused), persistent=False)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = nn.Parameter(torch.ones(d))

    @property
    def blocks(self) -> list[Layer]:
        """The layers, first to last."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def vectors(self, side: str) -> Tensor:
        """Vectors of all tokens [V, D] on the way "in" or "out"."""
        words = getattr(self, f"word_{side}") * self.learns + getattr(self, f"code_{side}")
        classes: Tensor = getattr(self, f"class_{side}")
        found: Tensor = classes[self.class_of] + words[self.word_of]
        return found

    def rotation(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, head size] of positions ``start`` to ``end``."""
        size, device = self.shape.head_dim, self.norm.device
        steps = torch.arange(0, size, 2, device=device).float() / size
        rates = self.shape.rope_theta**-steps
        angles = torch.arange(start, end, device=device).float()[:, None] * rates
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    def forward(self, token_ids: Tensor) -> Tensor:
        """Hidden states before the output vectors, normed."""
        return self.normed(self.states(token_ids)[-1])

    def normed(self, state: Tensor) -> Tensor:
        """What the output vectors are multiplied with."""
        return norm(state, self.norm, self.shape.rms_norm_eps)

    def states(self, token_ids: Tensor) -> list[Tensor]:
        """Hidden states [B, T, D] behind each layer."""
        x = functional.embedding(token_ids, self.vectors("in"))
        cos, sin = self.rotation(0, token_ids.shape[1])
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, cos, sin = x.to(dtype), cos.to(dtype), sin.to(dtype)
        found = []
        for layer in self.blocks:
            x = layer(x, (cos, sin))
            found.append(x)
        return found

    def loss(self, token_ids: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy where ``labels`` [B, T] is not -100; each predicts from the one before."""
        hidden = self(token_ids[:, :-1])
        wanted = labels[:, 1:]
        kept = wanted != -100
        logits = functional.linear(hidden[kept], self.vectors("out").to(hidden.dtype)).float()
        logits = logits.masked_fill(self.is_unused, -1e4)
        return functional.cross_entropy(logits, wanted[kept])

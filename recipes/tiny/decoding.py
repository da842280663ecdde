"""Decoding of many problems at once: greedy for whole-problem accuracy, sampled for more text."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from recipes.tiny.network import Network, norm

MAX_TOKENS = 480


Choose = Callable[[Tensor], Tensor]  # logits [B, V] to token ids [B]


def most_probable(logits: Tensor) -> Tensor:
    """The token with the highest logit."""
    return logits.argmax(-1)


def sampler(temperature: float, seed: int) -> Choose:
    """Draws tokens at a temperature, from the whole distribution."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        probabilities = (logits / temperature).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    return choose


@torch.inference_mode()
def decode(
    network: Network,
    prompts: Sequence[list[int]],
    end: int,
    batch_size: int = 100,
    choose: Choose = most_probable,
) -> list[list[int]]:
    """The continuation of each prompt, by default the most probable; ids without the ``end``."""
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        for row, tokens in zip(
            rows, _decode(network, [prompts[r] for r in rows], end, choose), strict=True
        ):
            found[row] = tokens
    return found


def _decode(
    network: Network, prompts: list[list[int]], end: int, choose: Choose
) -> list[list[int]]:
    device = network.norm.device
    length = max(map(len, prompts))
    # Padded on the left: rotary positions matter by their differences alone.
    ids = torch.tensor([[end] * (length - len(p)) + p for p in prompts], device=device)
    starts = torch.tensor([length - len(p) for p in prompts], device=device)
    shape, capacity = network.shape, length + MAX_TOKENS
    inward, outward = network.vectors("in"), network.vectors("out")
    cache_shape = (len(prompts), shape.num_heads, capacity, shape.head_dim)
    caches = [
        (torch.zeros(cache_shape, device=device), torch.zeros(cache_shape, device=device))
        for _ in network.layers
    ]
    cos, sin = network.rotation(0, capacity)
    places = torch.arange(capacity, device=device)
    outputs: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    ended: set[int] = set()
    begin = 0
    while len(ended) < len(prompts) and begin + ids.shape[1] <= capacity:
        stop = begin + ids.shape[1]
        causal = places[None, :stop] <= places[begin:stop, None]
        mask = (causal & (places[:stop] >= starts[:, None, None])) | (
            places[begin:stop, None] == places[:stop]
        )
        x = functional.embedding(ids, inward)
        for layer, (keys, values) in zip(network.layers, caches, strict=True):
            x = layer(x, (cos[begin:stop], sin[begin:stop]), (keys, values, begin), mask[:, None])
        x = norm(x[:, -1], network.norm, shape.rms_norm_eps)
        chosen = choose(functional.linear(x, outward))
        for row, token in zip(active, chosen.tolist(), strict=True):
            if token == end:
                ended.add(row)
            elif row not in ended:
                outputs[row].append(token)
        kept = [index for index, row in enumerate(active) if row not in ended]
        # Rows that ended are thinned out a few at a time: each thinning copies the caches.
        if len(kept) < 0.7 * len(active):
            rows = torch.tensor(kept, dtype=torch.long, device=device)
            caches = [(keys[rows], values[rows]) for keys, values in caches]
            starts, chosen = starts[rows], chosen[rows]
            active = [active[index] for index in kept]
        ids, begin = chosen[:, None], stop
    return outputs

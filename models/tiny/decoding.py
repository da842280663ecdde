"""Greedy decoding of many problems at once, for whole-problem accuracy."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from specguard.models.tiny.network import Network, norm

MAX_TOKENS = 480


@torch.inference_mode()
def greedy(
    network: Network, prompts: Sequence[list[int]], end: int, batch_size: int = 100
) -> list[list[int]]:
    """The most probable continuation of each prompt, token ids without the ``end``."""
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        for row, tokens in zip(
            rows, _decode(network, [prompts[r] for r in rows], end), strict=True
        ):
            found[row] = tokens
    return found


def _decode(network: Network, prompts: list[list[int]], end: int) -> list[list[int]]:
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
        chosen: Tensor = functional.linear(x, outward).argmax(-1)
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

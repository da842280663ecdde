"""Fewer neurons in a trained network's layers: those that others can stand in for go.

The optimal brain surgeon (Hassibi and Stork 1993) for one matrix: neurons go one at a time, each
time the one whose loss changes a layer's output least on reference solutions, and the remaining
ones take over what they can of it by least squares.
"""

import torch
from torch import Tensor
from torch.nn import functional

from recipes.tiny.data import Coder
from recipes.tiny.network import Network
from specguard.models.tiny import problems

_FIRST_PROBLEM = 10_000_000  # of the training stream, beyond those that are trained on
_NUM_PROBLEMS = 300
_RIDGE = 1e-4  # of the mean square of a neuron


def prune(network: Network, smaller: Network, coder: Coder, num_layers: int) -> None:
    """Fill ``smaller`` from ``network``, which has more neurons in its layers.

    Args:
        network: a trained one.
        smaller: of the same shape but for ``intermediate_size``.
        coder: for the texts.
        num_layers: how many layers are trained.
    """
    fitting = {name: value for name, value in network.state_dict().items() if not _is_mlp(name)}
    smaller.load_state_dict(fitting, strict=False)
    grams = _grams(network, coder, num_layers)
    for large, small, gram in zip(network.blocks, smaller.blocks, grams, strict=False):
        kept, down = _surgeon(gram, large.down_proj.weight.double().T, small.up_proj.out_features)
        small.gate_proj.weight.copy_(large.gate_proj.weight[kept])
        small.up_proj.weight.copy_(large.up_proj.weight[kept])
        small.down_proj.weight.copy_(down.T)


def _is_mlp(name: str) -> bool:
    return any(part in name for part in ("gate_proj", "up_proj", "down_proj"))


def _grams(network: Network, coder: Coder, num_layers: int) -> list[Tensor]:
    """For each layer the products [M, M] of its neurons, summed over tokens."""
    size = network.shape.intermediate_size
    grams = [torch.zeros(size, size, dtype=torch.float64) for _ in range(num_layers)]
    for index in range(_FIRST_PROBLEM, _FIRST_PROBLEM + _NUM_PROBLEMS):
        problem = problems.generate(problems.TRAINING, index)
        token_ids = torch.tensor([coder.row(problem).ids])
        states = functional.embedding(token_ids, network.vectors("in"))
        rotation = network.rotation(0, token_ids.shape[1])
        for block, gram in zip(network.blocks, grams, strict=False):
            found: list[Tensor] = []
            hook = block.down_proj.register_forward_pre_hook(
                lambda _, inputs, found=found: found.append(inputs[0])
            )
            states = block(states, rotation)
            hook.remove()
            neurons = found[0][0].double()
            gram += neurons.T @ neurons
    return grams


def _surgeon(gram: Tensor, down: Tensor, count: int) -> tuple[list[int], Tensor]:
    """The ``count`` neurons that stay, and their weights [count, D].

    Args:
        gram: [M, M], products of the neurons.
        down: [M, D], their weights.
        count: how many stay.
    """
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    inverse = torch.linalg.inv(gram + ridge)
    kept = list(range(len(gram)))
    while len(kept) > count:
        loss = down.square().sum(1) / inverse.diagonal()
        gone = int(loss.argmin())
        share = inverse[:, gone] / inverse[gone, gone]
        stays = [place for place in range(len(kept)) if place != gone]
        down = (down - torch.outer(share, down[gone]))[stays]
        inverse = (inverse - torch.outer(share, inverse[gone]))[stays][:, stays]
        del kept[gone]
    return kept, down

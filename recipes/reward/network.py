"""The reward model's network: the shipped target with fewer neurons, two more layers, and a head.

The target predicts each token from the ones before. The first layer behind it looks back at the
prediction and compares it with the token that came; the last gathers at a step's separator what
does not fit in the step, and the head scores that.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from recipes.reward.pruning import prune
from recipes.tiny.data import Coder
from recipes.tiny.export import layer_parameters
from recipes.tiny.network import Network, Shape
from recipes.tiny.wiring import BEFORE, BEFORE_2, FOUND, OWN, SECOND, head_of
from specguard.models.pairs import BUILT_IN_PAIR, find_pair

DRAFT, TARGET = map(Path, find_pair(BUILT_IN_PAIR).sources("torch"))
_LINE_END = ".ĊĊ"  # what ends a step as the draft writes it
_LOWEST = -8.0  # log-probability; what is less probable is as wrong


class RewardNetwork(Network):
    """Token ids [B, T] to hidden states [B, T, D], and ``score`` [.., D] to logits [.., 2].

    Every token is a word of its own here, so that vectors can be taken over from a saved model;
    those of names and things stay as they are.
    """

    def __init__(self, shape: Shape, coder: Coder) -> None:
        lexicon = coder.lexicon
        size = len(lexicon.word_of)
        own = replace(
            lexicon,
            words=tuple(map(str, range(size))),
            class_of=(0,) * size,
            word_of=tuple(range(size)),
            is_fixed=tuple(lexicon.is_fixed[word] for word in lexicon.word_of),
            num_classes=1,
        )
        super().__init__(shape, own)
        d = shape.hidden_size
        self.score = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, 2))
        # For training alone: how well a token fits, and the worst of its step so far.
        self.fit, self.lowest = nn.Linear(d, 1), nn.Linear(d, 1)

    def judging_losses(
        self, token_ids: Tensor, labels: Tensor, is_end: Tensor
    ) -> dict[str, Tensor]:
        """Cross-entropy at the steps' ends and that inside the steps; see also `_fitting`.

        Args:
            token_ids: [B, T].
            labels: [B, T], 1 where nothing is wrong in the step so far, 0 where something is,
                -100 where nobody can tell.
            is_end: [B, T], whether a token ends a step.
        """
        states = self.states(token_ids)
        hidden = self.normed(states[-1])
        losses = {}
        for name, where in ("end", is_end), ("inner", ~is_end):
            kept = where & (labels != -100)
            logits = self.score(hidden[kept]).float()
            losses[name] = functional.cross_entropy(logits, labels[kept])
        return losses | self._fitting(states, token_ids, labels, is_end)

    def predicting_losses(
        self, token_ids: Tensor, labels: Tensor, is_end: Tensor, written: Tensor
    ) -> dict[str, Tensor]:
        """Cross-entropy of the tokens, as the layers below the new ones predict them; `_fitting`.

        Args:
            token_ids: [B, T].
            labels: [B, T], -100 in the prompt.
            is_end: [B, T], whether a token ends a step.
            written: [B, T], the tokens to be predicted, -100 where none is.
        """
        states = self.states(token_ids)
        wanted = written[:, 1:]
        kept = wanted != -100
        logits = self._logits(states[-3][:, :-1][kept])
        prediction = functional.cross_entropy(logits, wanted[kept])
        return {"prediction": prediction} | self._fitting(states, token_ids, labels, is_end)

    def _fitting(
        self, states: list[Tensor], token_ids: Tensor, labels: Tensor, is_end: Tensor
    ) -> dict[str, Tensor]:
        """How far off the new layers are about what the layers below them say of the solution.

        The first says of each token the log-probability that it was given, the second the lowest
        one of the step so far: that is what the score is to be made of.
        """
        is_solution = (labels != -100).cumsum(1)[:, 1:] > 0
        with torch.no_grad():
            logprobs = self._logits(states[-3][:, :-1]).log_softmax(-1)
            found = logprobs.gather(-1, token_ids[:, 1:, None]).squeeze(-1).clamp(min=_LOWEST)
            found = torch.where(is_solution, found, 0.0)
            # Far below all steps before it, a step's minimum is that of all tokens so far.
            shift = 100.0 * (is_end.cumsum(1) - is_end.long())[:, 1:]
            lowest = (found - shift).cummin(1).values + shift
        heads = {"fit": (self.fit, states[-2], found), "lowest": (self.lowest, states[-1], lowest)}
        return {
            name: functional.smooth_l1_loss(
                head(self.normed(state[:, 1:][is_solution])).squeeze(-1).float(),
                wanted[is_solution],
            )
            for name, (head, state, wanted) in heads.items()
        }

    def _logits(self, states: Tensor) -> Tensor:
        """Of the next token, in single precision."""
        hidden = self.normed(states)
        logits = functional.linear(hidden, self.vectors("out").to(hidden.dtype)).float()
        return logits.masked_fill(self.is_unused, -1e4)


def shape_of(folder: Path, num_new_layers: int = 0, intermediate_size: int | None = None) -> Shape:
    """The shape of a saved model with so many layers more, and with so many neurons where given."""
    config = json.loads((folder / "config.json").read_text())
    return Shape(
        hidden_size=int(config["hidden_size"]),
        num_layers=int(config["num_hidden_layers"]) + num_new_layers,
        num_heads=int(config["num_attention_heads"]),
        intermediate_size=intermediate_size or int(config["intermediate_size"]),
    )


def from_model(
    coder: Coder,
    folder: Path,
    num_new_layers: int = 0,
    intermediate_size: int | None = None,
    seed: int = 0,
) -> RewardNetwork:
    """A model of the pair with ``num_new_layers`` on top, none or at least two, see the module.

    Its layers keep so many neurons (all, where ``intermediate_size`` is None), see `prune`.
    """
    torch.manual_seed(seed)
    weights = load_file(folder / "model.safetensors")
    shape = shape_of(folder, num_new_layers)
    num_layers = shape.num_layers - num_new_layers
    network = RewardNetwork(shape, coder)
    vectors = weights["model.embed_tokens.weight"].float()
    with torch.no_grad():
        network.code_in.copy_(vectors)
        network.code_out.copy_(weights["lm_head.weight"].float())
        network.norm.copy_(weights["model.norm.weight"].float())
        for name, parameter in layer_parameters(network).items():
            if name in weights:
                parameter.copy_(weights[name].float())
        if intermediate_size is not None:
            whole = network
            network = RewardNetwork(shape_of(folder, num_new_layers, intermediate_size), coder)
            prune(whole, network, coder, num_layers)
        line_end = coder.tokenizer.get_vocab()[_LINE_END]
        network.code_in[coder.pad] = vectors[line_end]
        for block in network.blocks[num_layers:]:
            block.o_proj.weight.zero_()
            block.down_proj.weight.zero_()
            for projection in block.q_proj, block.k_proj, block.v_proj, block.o_proj:
                projection.bias.zero_()
        if num_new_layers:
            direction = torch.randn(shape.hidden_size // 6).sign()
            _compare(network, direction)
            _gather(network, direction)
    return network


def _compare(network: Network, direction: Tensor) -> None:
    """Wire the last layer but one to say how well each token fits what was predicted for it.

    A head fetches the prediction from the token before; pairs of neurons multiply it with the
    token's own code: silu(g) u - silu(-g) u is g u. The sum stands along ``direction`` in the
    part BEFORE.
    """
    layer = network.shape.num_layers - 2
    head, block = head_of(network, layer, 0), network.blocks[layer]
    head.q.mul_(0.1)
    head.k.mul_(0.1)
    head.v.zero_()
    head.prefer(slice(0, 4), 1, 16.0)
    head.carry(FOUND, BEFORE_2, 3.0)
    part = head.part
    eye = torch.eye(part)
    for sign, rows in (1.0, slice(0, part)), (-1.0, slice(part, 2 * part)):
        block.gate_proj.weight[rows] = 0.0
        block.up_proj.weight[rows] = 0.0
        block.gate_proj.weight[rows, head.dims(BEFORE_2)] = sign * eye
        block.up_proj.weight[rows, head.dims(OWN)] = eye
        block.down_proj.weight[head.dims(BEFORE), rows] = 0.3 * sign * direction[:, None]


def _gather(network: Network, direction: Tensor) -> None:
    """Wire a head of the last layer to look at what fits worst in the last thirty tokens or so."""
    head = head_of(network, network.shape.num_layers - 1, 0)
    head.q.mul_(0.1)
    head.k.mul_(0.1)
    head.v.mul_(0.1)
    last = network.shape.head_dim - 1  # turns too slowly to notice distance
    size = (2.0 * head.scale) ** 0.5
    head.q_bias[last] += size
    head.k[last, head.dims(BEFORE)] -= size * direction / len(direction) ** 0.5
    head.prefer(slice(2, 4), 0, 1.0)
    head.carry(BEFORE, SECOND, 1.0)

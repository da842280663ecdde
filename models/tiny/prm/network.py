"""The reward model's network: the shipped draft, two more layers, and the head that scores.

The draft already predicts each token from the ones before; what is added looks back at the
prediction, compares it with the token that came, and gathers the step's outcome at its separator.
"""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from specguard.models.tiny.data import Coder
from specguard.models.tiny.export import layer_parameters
from specguard.models.tiny.network import Network, Shape
from specguard.models.tiny.wiring import BEFORE, BEFORE_2, FOUND, OWN, head_of

DRAFT = Path(__file__).parent.parent / "draft"
_LINE_END = ".ĊĊ"  # what ends a step as the draft writes it


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
        self.detect = nn.Linear(d, 2)  # for training alone

    def judge(self, token_ids: Tensor, labels: Tensor, is_end: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy at the steps' ends and that inside the steps.

        Args:
            token_ids: [B, T].
            labels: [B, T], 1 where nothing is wrong in the step so far, 0 where something is,
                -100 where nobody can tell.
            is_end: [B, T], whether a token ends a step.
        """
        hidden = self(token_ids)
        found = []
        for kept in is_end & (labels != -100), ~is_end & (labels != -100):
            logits = self.score(hidden[kept]).float()
            found.append(functional.cross_entropy(logits, labels[kept]))
        return found[0], found[1]

    def detection_loss(self, token_ids: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of telling tokens that were exchanged (0) from those that were not (1).

        One layer below the top: a step's end has to find there what does not fit.
        """
        kept = labels != -100
        hidden = self(token_ids, self.shape.num_layers - 1)
        return functional.cross_entropy(self.detect(hidden[kept]).float(), labels[kept])


def from_draft(coder: Coder, num_new_layers: int, seed: int) -> RewardNetwork:
    """The shipped draft with ``num_new_layers`` on top; the first of them compares, see there."""
    torch.manual_seed(seed)
    weights = load_file(DRAFT / "model.safetensors")
    vectors = weights["model.embed_tokens.weight"].float()
    num_layers = 1 + max(int(key.split(".")[2]) for key in weights if ".layers." in key)
    shape = Shape(vectors.shape[1], num_layers + num_new_layers, 3, 256)
    network = RewardNetwork(shape, coder)
    with torch.no_grad():
        network.code_in.copy_(vectors)
        network.code_out.copy_(weights["lm_head.weight"].float())
        vocabulary = coder.tokenizer.get_vocab()
        network.code_in[coder.pad] = vectors[vocabulary[_LINE_END]]
        network.norm.copy_(weights["model.norm.weight"].float())
        for name, parameter in layer_parameters(network).items():
            if name in weights:
                parameter.copy_(weights[name].float())
        for block in network.blocks[num_layers:]:
            block.o_proj.weight.zero_()
            block.down_proj.weight.zero_()
            for projection in block.q_proj, block.k_proj, block.v_proj, block.o_proj:
                projection.bias.zero_()
        if num_new_layers:
            _compare(network, num_layers)
    return network


def _compare(network: Network, layer: int) -> None:
    """Wire a layer to say how well each token fits what was predicted for it.

    A head fetches the prediction from the token before; pairs of neurons multiply it with the
    token's own code: silu(g) u - silu(-g) u is g u.
    """
    head, block = head_of(network, layer, 0), network.blocks[layer]
    head.q.mul_(0.1)
    head.k.mul_(0.1)
    head.v.zero_()
    head.prefer(slice(0, 4), 1, 16.0)
    head.carry(FOUND, BEFORE_2, 3.0)
    part = head.part
    eye, direction = torch.eye(part), torch.randn(part).sign()
    for sign, rows in (1.0, slice(0, part)), (-1.0, slice(part, 2 * part)):
        block.gate_proj.weight[rows] = 0.0
        block.up_proj.weight[rows] = 0.0
        block.gate_proj.weight[rows, head.dims(BEFORE_2)] = sign * eye
        block.up_proj.weight[rows, head.dims(OWN)] = eye
        block.down_proj.weight[head.dims(BEFORE), rows] = 0.1 * sign * direction[:, None]

"""Initial weights that can already look up: where training starts, not where it ends.

From random weights a network this small does not find out, in the training it gets here, whose
number is meant. It does when it starts with heads that
- look back: every token learns the two before it, and the mix of the last few (layer 1);
- match: a token finds what followed earlier where the same tokens stood, the latest of them for a
  number, and what came second where the same sentence ended (layer 2);
- point: the start of a step finds the sentence restated last and takes over what layer 2 found to
  come behind it in the problem (layer 3).
Every weight goes on learning. The residual stream starts out in six equal parts; it
takes three heads a layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.tiny.lexicon import Lexicon
from recipes.tiny.network import Network
from recipes.tiny.tokenizer import START

# Parts of the residual stream: the token itself, the one before, the one before that, the mix of
# the last few, what was found to come next, and what was found to come second.
OWN, BEFORE, BEFORE_2, MIX, FOUND, SECOND = range(6)
_NOISE = 0.02


@dataclass(frozen=True, slots=True)
class Head:
    """Views of one head's rows (queries, keys, values) and columns (output), and its positions."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor
    k_bias: Tensor
    rates: Tensor
    part: int

    def dims(self, part: int) -> slice:
        """Where a part is in the residual stream."""
        return slice(part * self.part, (part + 1) * self.part)

    @property
    def scale(self) -> float:
        """What the product of a query and a key is divided by."""
        return float(self.q.shape[0] ** 0.5)

    def prefer(self, pairs: slice, distance: float, strength: float) -> None:
        """Add ``strength`` times the sum over ``pairs`` of cos(rate * (distance - given one))."""
        half = len(self.rates)
        size = (strength * self.scale) ** 0.5
        rates = self.rates[pairs]
        self.q_bias[:half][pairs] += size
        self.k_bias[:half][pairs] += size * torch.cos(rates * distance)
        self.k_bias[half:][pairs] += size * torch.sin(rates * distance)

    def match(
        self, dims: Tensor, asked: int, offered: int, strength: float, amplitude: float
    ) -> None:
        """Add up to ``strength`` where my part ``asked`` is the other's part ``offered``.

        ``amplitude`` is the size of a part's numbers after the norm.
        """
        dims = dims[: self.part]
        size = (strength * self.scale / (len(dims) * amplitude**2)) ** 0.5
        projection = size * torch.linalg.qr(torch.randn(self.part, len(dims)))[0].T
        self.q[dims, self.dims(asked)] += projection
        self.k[dims, self.dims(offered)] += projection

    def carry(self, source: int, goal: int, gain: float) -> None:
        """Write ``gain`` times the part ``source`` of what is seen into the part ``goal``."""
        eye = torch.eye(self.part)
        self.v[: self.part, self.dims(source)] += eye
        self.o[self.dims(goal), : self.part] += gain * eye


def head_of(network: Network, layer: int, index: int) -> Head:
    """One head of a network, to be wired."""
    found, size = network.blocks[layer], network.shape.head_dim
    rows = slice(index * size, (index + 1) * size)
    steps = torch.arange(0, size, 2).float() / size
    return Head(
        found.q_proj.weight.data[rows],
        found.k_proj.weight.data[rows],
        found.v_proj.weight.data[rows],
        found.o_proj.weight.data[:, rows],
        found.q_proj.bias.data[rows],
        found.k_proj.bias.data[rows],
        network.shape.rope_theta**-steps,
        network.shape.hidden_size // 6,
    )


def wire(network: Network, lexicon: Lexicon, seed: int) -> None:
    """Fill a network's weights; ``seed`` decides the codes and the small random rest."""
    torch.manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=_NOISE)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    part = network.shape.hidden_size // 6
    codes = torch.randint(2, (lexicon.num_words, part)).float() * 2 - 1
    # What somebody had is what somebody has: nearly the same code lets one be found by the other.
    codes[lexicon.word("had")] = codes[lexicon.word("has")]
    codes[lexicon.word("had"), :3] *= -1
    with torch.no_grad():
        network.code_in[:, :part] = codes
        network.code_out[:, FOUND * part : (FOUND + 1) * part] = 8 / part * codes
        _look_back(network)
        _find(network)
        if network.shape.num_heads > 3:
            _go_on_with_numbers(network, codes[lexicon.word(".")], codes[lexicon.word(START)])
        if network.shape.num_layers > 2:
            _point(network, lexicon, codes)


def _look_back(network: Network) -> None:
    amplitude = 6**0.5
    for index, (distance, part) in enumerate([(1, BEFORE), (2, BEFORE_2)]):
        head = head_of(network, 0, index)
        head.prefer(slice(0, 4), distance, 16.0)
        head.carry(OWN, part, 1 / amplitude)
    mix = head_of(network, 0, 2)
    # Rates that tell the last few tokens from those before, and never come round again together.
    fast = int((mix.rates > 0.33).sum())
    mix.prefer(slice(fast, int((mix.rates > 0.03).sum())), 0, 2.5)
    mix.carry(OWN, MIX, 2 / amplitude)


def _slow(network: Network, start: int, count: int) -> Tensor:
    """Head dimensions that turn too slowly to notice distance, ``count`` of them."""
    half = network.shape.head_dim // 2
    first = half // 3
    slow = torch.cat([torch.arange(first, half), torch.arange(first + half, 2 * half)])
    return slow[start : start + count]


def _find(network: Network) -> None:
    amplitude, size = 1.28, len(_slow(network, 0, 1000))
    third = size // 3
    parts = [_slow(network, i * third, third) for i in range(3)]
    following = head_of(network, 1, 0)
    following.match(parts[0], OWN, BEFORE, 12.0, amplitude)
    following.match(parts[1], BEFORE, BEFORE_2, 8.0, amplitude)
    following.match(parts[2], MIX, MIX, 8.0, amplitude)
    following.prefer(_recency(network), 0, 1.0)
    following.carry(OWN, FOUND, 0.8)
    latest = head_of(network, 1, 1)
    half = size // 2
    latest.match(_slow(network, 0, half), OWN, BEFORE, 12.0, amplitude)
    latest.match(_slow(network, half, half), BEFORE, BEFORE_2, 14.0, amplitude)
    latest.prefer(_recency(network), 0, 14.0)
    latest.carry(OWN, FOUND, 0.6)
    second = head_of(network, 1, 2)
    second.match(_slow(network, 0, half), OWN, BEFORE_2, 12.0, amplitude)
    second.match(_slow(network, half, half), MIX, MIX, 16.0, amplitude)
    second.carry(OWN, SECOND, 0.8)


def _go_on_with_numbers(network: Network, stop: Tensor, sink: Tensor) -> None:
    """Heads for the second digit of a number: by the digit, the verb and the name before it.

    Two tokens back say "has 1" and not whose: 16 is then continued like anybody's number that
    begins with 1. The third token back lies in the part SECOND, save at the end of a sentence,
    where that part is needed.
    """
    back = head_of(network, 0, 3)
    back.prefer(slice(0, 4), 3, 16.0)
    last = network.shape.head_dim - 1
    own, size = back.dims(OWN), (40.0 * back.scale) ** 0.5 / back.part / 6**0.5
    back.q[last, own] += size * stop
    back.k[last, own] += size * sink
    back.carry(OWN, SECOND, 1 / 6**0.5)
    back.v[: back.part, own] -= torch.outer(sink, sink) / back.part
    number = head_of(network, 1, 3)
    size_of = len(_slow(network, 0, 1000)) // 3
    parts = [(OWN, BEFORE), (BEFORE, BEFORE_2), (BEFORE_2, SECOND)]
    for index, (asked, offered) in enumerate(parts):
        number.match(_slow(network, index * size_of, size_of), asked, offered, 14.0, 1.2)
    nearest = _recency(network).start
    number.prefer(slice(nearest - 2, nearest + 1), 0, 4.0)
    number.carry(OWN, FOUND, 0.8)


def _recency(network: Network) -> slice:
    """The pair of dimensions that turns by half a circle in some 300 tokens."""
    steps = torch.arange(0, network.shape.head_dim, 2).float() / network.shape.head_dim
    rates = network.shape.rope_theta**-steps
    nearest = int((rates.log() - torch.tensor(0.01).log()).abs().argmin())
    return slice(nearest, nearest + 1)


def _point(network: Network, lexicon: Lexicon, codes: Tensor) -> None:
    stop = codes[lexicon.word(".")]
    sink = codes[lexicon.word(START)]
    line = codes[lexicon.word(".ĊĊ")]
    end, idle = network.shape.head_dim - 1, network.shape.head_dim - 2
    rest = _after_two_layers(network, lexicon)
    for index, (asked, source) in enumerate([(OWN, FOUND), (BEFORE, SECOND)]):
        head = head_of(network, 2, index)
        # 26 for a stop seen from the start of a step, 10 for the first token from anywhere.
        size = (26.0 * head.scale) ** 0.5 / head.part
        head.q[end, head.dims(asked)] += size * line
        head.k[end, head.dims(OWN)] += size * stop
        head.q_bias[idle] += (10.0 * head.scale) ** 0.5
        for part in (OWN, BEFORE):
            head.k[idle, head.dims(part)] += (10.0 * head.scale) ** 0.5 / head.part / 2 * sink
        nearest = _recency(network).start
        head.prefer(slice(nearest - 2, nearest + 1), 0, 7.0)
        head.carry(source, FOUND, 1.6)
        # Who has nothing to ask rests on the first token, and takes nothing from there.
        own = rest[head.dims(OWN)]
        head.v[: head.part, head.dims(OWN)] -= torch.outer(rest[head.dims(source)], own) / own.dot(
            own
        )


def _after_two_layers(network: Network, lexicon: Lexicon) -> Tensor:
    """The residual stream [D] of the first token of every text."""
    token = lexicon.word_of.index(lexicon.word(START))
    x = network.vectors("in")[None, None, token]
    for layer in network.blocks[:2]:
        x = layer(x, network.rotation(0, 1))
    return x[0, 0]

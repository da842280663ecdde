"""Shape and training of the two models of the pair."""

from dataclasses import dataclass
from pathlib import Path

import torch

from specguard.models.tiny.lexicon import Lexicon
from specguard.models.tiny.network import Network, Shape
from specguard.models.tiny.problems import Difficulty


@dataclass(frozen=True, slots=True)
class Phase:
    """So many tokens of problems of one difficulty, and of exercises in calculation."""

    name: str
    tokens: int
    difficulty: Difficulty
    drill_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model is trained; ``check_every`` is in tokens."""

    shape: Shape
    phases: tuple[Phase, ...]
    peak_rate: float = 3e-3
    warmup_steps: int = 60
    decay_from: float = 0.5
    decay_power: float = 1.0
    batch_tokens: int = 8192
    check_every: int = 1_000_000
    seed: int = 0
    bf16: bool = True

    @property
    def tokens(self) -> int:
        """Length of the whole training."""
        return sum(phase.tokens for phase in self.phases)

    def rate(self, tokens: int, steps: int) -> float:
        """Learning rate: warm-up, constant, then down to nearly zero, in a line at power 1."""
        warm = min(1.0, (steps + 1) / self.warmup_steps)
        left = 1 - tokens / self.tokens
        falling = min(1.0, left / (1 - self.decay_from)) ** self.decay_power if left > 0 else 0.0
        return self.peak_rate * warm * max(0.01, falling)


_SHORT = Difficulty(max_actors=1, max_events=3, max_distractors=1, large_share=0.1)
_MIDDLE = Difficulty(max_actors=2, max_events=4, max_distractors=1, large_share=0.3)

RECIPES = {
    "target": Recipe(
        Shape(192, 4, 4, 512),
        (
            Phase("short", 1_000_000, _SHORT, 0.4),
            Phase("middle", 2_000_000, _MIDDLE, 0.4),
            Phase("all, with drills", 5_500_000, Difficulty(), 0.3),
            Phase("all", 7_000_000, Difficulty()),
        ),
        decay_from=0.45,
        decay_power=1.5,
    ),
    "draft": Recipe(
        Shape(96, 3, 3, 256),
        (
            Phase("short", 800_000, _SHORT, 0.4),
            Phase("middle", 1_200_000, _MIDDLE, 0.4),
            Phase("all", 4_000_000, Difficulty(), 0.3),
        ),
    ),
}


def load_network(recipe: Recipe, lexicon: Lexicon, folder: Path) -> Network:
    """The network of a run's last checkpoint, in float32, for evaluation."""
    network = Network(recipe.shape, lexicon)
    state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    network.load_state_dict(state["network"])
    return network.eval()

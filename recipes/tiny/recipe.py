"""Shape and training of the two models of the pair."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from recipes.tiny.lexicon import Lexicon
from recipes.tiny.network import Network, Shape
from recipes.tiny.progress import CHECKPOINT
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
    """How one model is trained.

    ``rates`` are learning rates at numbers of tokens, with straight lines between them; it is
    checked every ``check_every`` tokens.
    """

    shape: Shape
    phases: tuple[Phase, ...]
    rates: tuple[tuple[int, float], ...]
    warmup_steps: int = 60
    batch_tokens: int = 8192
    check_every: int = 1_000_000
    seed: int = 0
    bf16: bool = True

    @property
    def tokens(self) -> int:
        """Length of the whole training."""
        return sum(phase.tokens for phase in self.phases)

    def rate(self, tokens: int, steps: int) -> float:
        """Learning rate after so many tokens and steps; the first steps warm up."""
        warm = min(1.0, (steps + 1) / self.warmup_steps)
        places, rates = zip(*self.rates, strict=True)
        return warm * float(np.interp(tokens, places, rates))


_SHORT = Difficulty(max_actors=1, max_events=3, max_distractors=1, large_share=0.1)
_MIDDLE = Difficulty(max_actors=2, max_events=4, max_distractors=1, large_share=0.3)

RECIPES = {
    "target": Recipe(
        Shape(192, 4, 4, 512),
        (
            Phase("short", 1_000_000, _SHORT, 0.4),
            Phase("middle", 2_000_000, _MIDDLE, 0.4),
            Phase("all, with drills", 5_500_000, Difficulty(), 0.3),
            Phase("all", 9_300_000, Difficulty()),
        ),
        rates=(
            (0, 3e-3),
            (7_000_000, 3e-3),
            (9_800_000, 1.6e-3),
            (13_000_000, 1e-3),
            (17_800_000, 2e-5),
        ),
    ),
    "draft": Recipe(
        Shape(96, 3, 3, 256),
        (
            Phase("short", 800_000, _SHORT, 0.4),
            Phase("middle", 1_200_000, _MIDDLE, 0.4),
            Phase("all", 4_000_000, Difficulty(), 0.3),
        ),
        rates=((0, 3e-3), (3_000_000, 3e-3), (6_000_000, 3e-5)),
    ),
}


def load_network(recipe: Recipe, lexicon: Lexicon, folder: Path) -> Network:
    """The network of a run's last checkpoint, in float32, for evaluation."""
    network = Network(recipe.shape, lexicon)
    state = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
    network.load_state_dict(state["network"])
    return network.eval()

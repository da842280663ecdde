"""Training of the reward model: a run that goes on from its checkpoint, and its log."""

import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from recipes.reward.data import batches, replaced_batches
from recipes.reward.network import DRAFT, TARGET, RewardNetwork, from_model, shape_of
from recipes.tiny.data import Coder
from recipes.tiny.progress import CHECKPOINT, SECONDS_PER_CHECKPOINT, TrainingRun
from recipes.tiny.train import make_optimizers, set_rate


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the reward model is trained.

    ``rates`` are learning rates at shares of the ``tokens``, with straight lines between them.
    """

    tokens: int = 14_000_000
    num_new_layers: int = 2
    intermediate_size: int | None = 104
    batch_tokens: int = 4096
    pool: int = 512
    rates: tuple[tuple[float, float], ...] = ((0.0, 1.5e-3), (0.6, 1.5e-3), (1.0, 2e-5))
    warmup_steps: int = 40
    seed: int = 0
    bf16: bool = True

    def empty_network(self, coder: Coder) -> RewardNetwork:
        """A network to load a checkpoint into."""
        return RewardNetwork(shape_of(TARGET, self.num_new_layers, self.intermediate_size), coder)

    def network(self, coder: Coder) -> RewardNetwork:
        """What training begins with."""
        return from_model(coder, TARGET, self.num_new_layers, self.intermediate_size, self.seed)

    def rate(self, tokens: int, steps: int) -> float:
        """Learning rate after so many tokens and steps; the first steps warm up."""
        warm = min(1.0, (steps + 1) / self.warmup_steps)
        places, rates = zip(*self.rates, strict=True)
        return warm * float(np.interp(tokens / self.tokens, places, rates))


class Run(TrainingRun):
    """A reward model in training: its weights, its optimizers, and how many tokens it has seen."""

    def __init__(self, recipe: Recipe, coder: Coder, folder: Path) -> None:
        self.recipe, self.coder = recipe, coder
        self.draft = from_model(coder, DRAFT).eval()
        is_new = not (folder / CHECKPOINT).exists()
        self.network = recipe.network(coder) if is_new else recipe.empty_network(coder)
        super().__init__(self.network, make_optimizers(self.network), folder)

    def train(self, until: int) -> None:
        """Train until ``until`` tokens have been seen."""
        losses: dict[str, deque[float]] = {}
        saved = logged = time.monotonic()
        seen_then = self.tokens
        recipe = self.recipe
        source = batches(
            self.coder, self.draft, self.next_problem, recipe.batch_tokens, recipe.pool
        )
        exchanged = replaced_batches(self.coder, self.steps * 100, recipe.batch_tokens)
        while self.tokens < until:
            token_ids, labels, is_end, next_problem = next(source)
            set_rate(self.optimizers, recipe.rate(self.tokens, self.steps))
            other_ids, *others = next(exchanged)
            with torch.autocast("cpu", torch.bfloat16) if recipe.bf16 else nullcontext():
                # "fit" and "lowest" count in both kinds of text.
                judging = self.network.judging_losses(token_ids, labels, is_end)
                predicting = self.network.predicting_losses(other_ids, *others)
            for found in judging, predicting:
                sum(found.values(), torch.zeros(())).backward()
            self.descend()
            for name, loss in (predicting | judging).items():
                losses.setdefault(name, deque(maxlen=50)).append(loss.item())
            self.tokens += token_ids.numel() + other_ids.numel()
            self.steps += 1
            # A resumed run begins with a fresh pool: what was left of this one is skipped.
            self.next_problem = next_problem
            now = time.monotonic()
            if self.steps % 50 == 0:
                speed = (self.tokens - seen_then) / (now - logged)
                logged, seen_then = now, self.tokens
                means = {name: round(sum(last) / len(last), 4) for name, last in losses.items()}
                self.log(**means, problems=self.next_problem, tokens_per_s=round(speed))
            if now - saved > SECONDS_PER_CHECKPOINT:
                saved = now
                self.save()
        self.save()


def load_network(recipe: Recipe, coder: Coder, folder: Path) -> RewardNetwork:
    """The network of a run's last checkpoint."""
    network = recipe.empty_network(coder)
    state = torch.load(folder / CHECKPOINT, weights_only=True)
    network.load_state_dict(state["network"])
    return network.eval()

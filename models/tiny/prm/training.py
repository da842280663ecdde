"""Training of the reward model: a run that goes on from its checkpoint, and its log."""

import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from specguard.models.tiny.data import Coder
from specguard.models.tiny.prm.data import batches, replaced_batches
from specguard.models.tiny.prm.network import RewardNetwork, from_draft
from specguard.models.tiny.progress import SECONDS_PER_CHECKPOINT, TrainingRun
from specguard.models.tiny.train import make_optimizers, set_rate


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the reward model is trained.

    ``rates`` are learning rates at shares of the ``tokens``, with straight lines between them;
    ``inner_weight`` is that of the loss inside steps beside the loss at their ends.
    """

    tokens: int = 4_200_000
    num_new_layers: int = 2
    batch_tokens: int = 4096
    pool: int = 512
    rates: tuple[tuple[float, float], ...] = ((0.0, 2e-3), (0.4, 2e-3), (1.0, 2e-5))
    warmup_steps: int = 40
    inner_weight: float = 1.0
    seed: int = 0
    bf16: bool = True

    def rate(self, tokens: int, steps: int) -> float:
        """Learning rate after so many tokens and steps; the first steps warm up."""
        warm = min(1.0, (steps + 1) / self.warmup_steps)
        places, rates = zip(*self.rates, strict=True)
        return warm * float(np.interp(tokens / self.tokens, places, rates))


class Run(TrainingRun):
    """A reward model in training: its weights, its optimizers, and how many tokens it has seen."""

    def __init__(self, recipe: Recipe, coder: Coder, folder: Path) -> None:
        self.recipe, self.coder = recipe, coder
        self.draft = from_draft(coder, 0, recipe.seed).eval()
        self.network = from_draft(coder, recipe.num_new_layers, recipe.seed)
        super().__init__(self.network, make_optimizers(self.network), folder)

    def train(self, until: int) -> None:
        """Train until ``until`` tokens have been seen."""
        ends, inners, detections = (deque[float](maxlen=50) for _ in range(3))
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
            with torch.autocast("cpu", torch.bfloat16) if recipe.bf16 else nullcontext():
                end, inner = self.network.judge(token_ids, labels, is_end)
            (end + recipe.inner_weight * inner).backward()
            other_ids, other_labels = next(exchanged)
            with torch.autocast("cpu", torch.bfloat16) if recipe.bf16 else nullcontext():
                detection = self.network.detection_loss(other_ids, other_labels)
            detection.backward()
            detections.append(detection.item())
            self.descend()
            ends.append(end.item())
            inners.append(inner.item())
            self.tokens += token_ids.numel() + other_ids.numel()
            self.steps += 1
            # A resumed run begins with a fresh pool: what was left of this one is skipped.
            self.next_problem = next_problem
            now = time.monotonic()
            if self.steps % 50 == 0:
                speed = (self.tokens - seen_then) / (now - logged)
                logged, seen_then = now, self.tokens
                losses = {"loss": _mean(ends), "inner_loss": _mean(inners)}
                losses["detection_loss"] = _mean(detections)
                self.log(**losses, problems=self.next_problem, tokens_per_s=round(speed))
            if now - saved > SECONDS_PER_CHECKPOINT:
                saved = now
                self.save()
        self.save()


def _mean(losses: deque[float]) -> float:
    return round(sum(losses) / len(losses), 4)


def load_network(recipe: Recipe, coder: Coder, folder: Path) -> RewardNetwork:
    """The network of a run's last checkpoint."""
    network = from_draft(coder, recipe.num_new_layers, recipe.seed)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    network.load_state_dict(state["network"])
    return network.eval()

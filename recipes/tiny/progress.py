"""How far a training run has come: its checkpoint, from which it goes on, and its log."""

import json
import os
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn
from torch.optim import Optimizer

SECONDS_PER_CHECKPOINT = 120
CHECKPOINT = "checkpoint.pt"


class TrainingRun:
    """A network in training: its weights, its optimizers, and how many tokens it has seen.

    What ``folder`` holds of an earlier run is taken up.
    """

    def __init__(
        self, network: nn.Module, optimizers: list[Optimizer], folder: Path, device: str = "cpu"
    ) -> None:
        # Texts differ in length, and oneDNN keeps buffers for every shape that it has met.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
        os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
        self.optimizers, self.folder = optimizers, folder
        self._weights = network
        self.tokens, self.next_problem, self.steps = 0, 0, 0
        if self._checkpoint.exists():
            state = torch.load(self._checkpoint, map_location=device, weights_only=True)
            network.load_state_dict(state["network"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.tokens, self.next_problem = state["tokens"], state["next_problem"]
            self.steps = state["steps"]

    @property
    def _checkpoint(self) -> Path:
        return self.folder / CHECKPOINT

    def save(self) -> None:
        """Replace the checkpoint in one go."""
        state = {
            "network": self._weights.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "tokens": self.tokens,
            "next_problem": self.next_problem,
            "steps": self.steps,
        }
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._checkpoint)

    def log(self, **record: Any) -> None:
        """Append a line to the log and show it."""
        line = json.dumps({"tokens": self.tokens, "steps": self.steps, **record})
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        click.echo(line)

    def descend(self) -> None:
        """One step of the optimizers along the gradients that were gathered."""
        torch.nn.utils.clip_grad_norm_(self._weights.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

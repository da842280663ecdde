"""The recipe of the built-in pair: ``python -m recipes.tiny.train --help``.

Trains one network on generated problems, phase by phase. A run that was stopped goes on from its
last checkpoint when started again; what it did is in ``log.jsonl`` beside it.
"""

import time
from collections import deque
from contextlib import nullcontext
from pathlib import Path

import click
import torch
from torch.optim import AdamW, Muon, Optimizer

from recipes.tiny.data import Coder, Row, batches, make_coder
from recipes.tiny.drills import drill
from recipes.tiny.evaluate import solve
from recipes.tiny.network import Network
from recipes.tiny.progress import SECONDS_PER_CHECKPOINT, TrainingRun
from recipes.tiny.recipe import RECIPES, Phase, Recipe
from recipes.tiny.wiring import wire
from specguard.models.tiny import problems


def make_optimizers(network: Network) -> list[Optimizer]:
    """Muon for the layers' matrices, AdamW for vectors, biases and gains."""
    layers = network.layers.parameters()
    matrices = [parameter for parameter in layers if parameter.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in network.parameters() if id(parameter) not in chosen]
    return [
        Muon(matrices, lr=1.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        AdamW(others, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def set_rate(optimizers: list[Optimizer], rate: float) -> None:
    """Give every parameter this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


class Run(TrainingRun):
    """A network in training: its weights, its optimizers, and how many tokens it has seen."""

    def __init__(self, recipe: Recipe, coder: Coder, folder: Path, device: str) -> None:
        self.recipe, self.coder, self.device = recipe, coder, device
        self.network = Network(recipe.shape, coder.lexicon)
        wire(self.network, coder.lexicon, recipe.seed)
        self.network.to(device)
        super().__init__(self.network, make_optimizers(self.network), folder, device)

    def row(self, phase: Phase, index: int) -> Row:
        """Text number ``index``: an exercise or a problem, spread evenly."""
        share = phase.drill_share
        if int((index + 1) * share) > int(index * share):
            return self.coder.pieces(drill(index))
        return self.coder.row(problems.generate(problems.TRAINING, index, phase.difficulty))

    def train(self, phase: Phase, until: int) -> None:
        """Train on one phase's problems until ``until`` tokens have been seen."""
        losses: deque[float] = deque(maxlen=50)
        saved = logged = time.monotonic()
        seen_then = self.tokens
        kind = torch.device(self.device).type
        source = batches(
            self.coder,
            lambda index: self.row(phase, index),
            self.next_problem,
            self.recipe.batch_tokens,
        )
        for token_ids, labels, next_problem in source:
            set_rate(self.optimizers, self.recipe.rate(self.tokens, self.steps))
            token_ids, labels = token_ids.to(self.device), labels.to(self.device)
            mixed = torch.autocast(kind, torch.bfloat16) if self.recipe.bf16 else nullcontext()
            with mixed:
                loss = self.network.loss(token_ids, labels)
            loss.backward()
            self.descend()
            losses.append(loss.item())
            self.tokens += token_ids.numel()
            self.steps += 1
            # A resumed run begins with a fresh pool: what was left of this one is skipped.
            self.next_problem = next_problem
            now = time.monotonic()
            if self.steps % 50 == 0:
                speed = (self.tokens - seen_then) / (now - logged)
                logged, seen_then = now, self.tokens
                mean = sum(losses) / len(losses)
                self.log(loss=round(mean, 4), phase=phase.name, tokens_per_s=round(speed))
            if now - saved > SECONDS_PER_CHECKPOINT:
                saved = now
                self.save()
            if self.tokens // self.recipe.check_every > (
                (self.tokens - token_ids.numel()) // self.recipe.check_every
            ):
                self.check(60)
            if self.tokens >= until:
                break
        self.save()

    def check(self, count: int) -> None:
        """Log whole-problem accuracy on fresh problems, and what goes wrong first."""
        result = solve(self.network, self.coder, problems.CALIBRATION, count)
        share = round(result.right_steps / result.steps, 4)
        self.log(right=result.num_right / count, steps_right=share, places=result.places)


@click.command()
@click.option("--model", "name", type=click.Choice(list(RECIPES)), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, default=None, help="Threads that torch may use.")
def main(name: str, output: Path, device: str, threads: int | None) -> None:
    """Train a model of the pair into OUTPUT, or go on with it."""
    if threads is not None:
        torch.set_num_threads(threads)
    recipe = RECIPES[name]
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(recipe, make_coder(), folder, device)
    until = 0
    for phase in recipe.phases:
        until += phase.tokens
        if run.tokens < until:
            run.train(phase, until)
    run.check(500)


if __name__ == "__main__":
    main()

"""Command line of the reward model's recipe: train, export, evaluate."""

from pathlib import Path

import click
import torch

from recipes.evidence.signals import sample
from recipes.evidence.steps import collect
from recipes.reward.evaluate import REWARD, THRESHOLD, Quality, add_rewards, areas
from recipes.reward.export import export as export_to
from recipes.reward.training import Recipe, Run, load_network
from recipes.tiny.data import make_coder
from specguard import load
from specguard.backends.reward import load_reward_model
from specguard.models.pairs import BUILT_IN_PAIR, find_pair
from specguard.models.tiny import problems

STREAMS = {"calibration": problems.CALIBRATION, "held-out": problems.HELD_OUT}
SIGNALS = (REWARD, "draft log_prob", "target log_prob")


@click.group()
def main() -> None:
    """Train, export and measure the built-in pair's process reward model."""


@main.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
@click.option("--threads", type=int, default=None, help="Threads that torch may use.")
def train(output: Path, threads: int | None) -> None:
    """Train into OUTPUT, or go on with it."""
    if threads is not None:
        torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    run = Run(Recipe(), make_coder(), output)
    run.train(run.recipe.tokens)


@main.command()
@click.option("--run", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
def export(run: Path, output: Path) -> None:
    """Export a run's last checkpoint, and load what was saved."""
    coder = make_coder()
    export_to(load_network(Recipe(), coder, run), coder, output)
    load_reward_model(str(output))
    size = sum(path.stat().st_size for path in output.iterdir()) / 1e6
    click.echo(f"{output}: {size:.2f} MB")


@main.command()
@click.option("--model", default=find_pair(BUILT_IN_PAIR).reward, show_default=False)
@click.option("--stream", type=click.Choice(list(STREAMS)), default="calibration")
@click.option("--count", default=150, show_default=True, help="Problems.")
@click.option("--steps", type=click.Path(path_type=Path), required=True, help="Their draft steps.")
@click.option("--backend", default="cpu", show_default=True)
def evaluate(model: str, stream: str, count: int, steps: Path, backend: str) -> None:
    """Rewards of draft steps after right prefixes, by default of the shipped model.

    STEPS is a file as of ``python -m recipes.evidence collect``; what it lacks is
    sampled. Steps that answer are among them.
    """
    solver = load(BUILT_IN_PAIR, backend=backend, draft_cost=None)
    rows = collect(solver, ("draft",), STREAMS[stream], count, steps)
    add_rewards(load_reward_model(model, backend), STREAMS[stream], rows)
    found = sample(rows, "draft")
    quality = Quality.of(found)
    click.echo(f"{len(found.errors)} draft steps of {count} problems")
    click.echo(f"right: {found.is_right.mean():.1%}")
    for name, (area, by_kind) in areas(found, SIGNALS).items():
        kinds = ", ".join(f"{kind} {value:.3f}" for kind, value in by_kind.items())
        click.echo(f"AUC of {name}: {area:.3f}; against {kinds}")
    click.echo(
        f"accepted from {THRESHOLD} on: {quality.right_accepted:.1%} of the right and "
        f"{quality.wrong_accepted:.1%} of the wrong steps; accuracy {quality.accuracy:.1%}"
    )
    click.echo(f"Brier score {quality.brier:.4f}, of the share alone {quality.base_brier:.4f}")


if __name__ == "__main__":
    main()

"""``specguard bench context``: how the cost of a step grows with the text before it."""

import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from rich.progress import track

from specguard import UsageError, load
from specguard.backends.registry import choose_backend
from specguard.bench.context import context_table, time_contexts
from specguard.bench.random_pair import Shape, write_random_model
from specguard.bench.tables import machine, machine_line
from specguard.cli.options import numbers
from specguard.cli.output import console


@click.command()
@click.option("--backend", default="auto", show_default=True, metavar="[auto|mlx|cuda|mps|cpu]")
@click.option(
    "--lengths",
    default="512,1024,2048,4096,8192",
    show_default=True,
    help="Tokens of context, separated by commas.",
)
@click.option("--layers", default=24, show_default=True, help="Of the random model.")
@click.option("--hidden", default=256, show_default=True, help="Its hidden size.")
@click.option(
    "--k", "count", type=click.IntRange(min=1), default=4, show_default=True, help="Candidates."
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Of every timing.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of the table.")
def context(
    backend: str, lengths: str, layers: int, hidden: int, count: int, rounds: int, as_json: bool
) -> None:
    """Time the verbs of a step of 32 tokens behind contexts of several lengths.

    The model has random weights. Time may grow with attention's own share, in a straight line.
    Attention is captured in the last three layers.
    """
    wanted = sorted(numbers(lengths, "--lengths", int))
    if wanted[0] < 1:
        raise UsageError("--lengths must be at least 1")
    shape = Shape(layers, hidden, num_positions=wanted[-1] + 64)
    with TemporaryDirectory() as folder:
        path = str(write_random_model(Path(folder), shape, seed=0))
        model = load(target=path, backend=backend, dtype="float32", method="target").target
        assert model is not None
        err = console(stderr=True)
        lines = list(
            track(
                time_contexts(model, wanted, count, num_rounds=rounds, num_layers=min(3, layers)),
                description="timing",
                total=len(wanted),
                console=err,
                disable=not err.is_terminal,
            )
        )
    about = {
        **machine(),
        "backend": choose_backend(backend)[0],
        "layers": str(layers),
        "hidden size": str(hidden),
    }
    if as_json:
        click.echo(json.dumps({"machine": about, "lines": [asdict(line) for line in lines]}))
        return
    click.echo(f"{machine_line(about)}; k = {count}, ms.\n\n{context_table(lines)}", nl=False)

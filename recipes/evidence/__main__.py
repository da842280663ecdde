"""Command line of the measurements; each one goes on where it was stopped."""

import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np

from recipes.evidence import selection, steps
from recipes.evidence import signals as judged
from recipes.evidence.sensitivity import layers_and_epsilon, weight_and_threshold
from specguard import Solver, load
from specguard.bench.datasets import DataSet, Item
from specguard.bench.report import as_markdown, summarise
from specguard.bench.runner import Run
from specguard.core.errors import SpecguardError
from specguard.journal import read_lines
from specguard.models.pairs import BUILT_IN_PAIR, find_pair
from specguard.models.tiny import problems

F = TypeVar("F", bound=Callable[..., Any])
STREAMS = {"calibration": problems.CALIBRATION, "held-out": problems.HELD_OUT}
KINDS = {"steps": False, "answers": True}


def run_options(command: F) -> F:
    """What a run over problems needs."""
    for option in (
        click.option("--output", type=click.Path(path_type=Path), required=True),
        click.option("--count", default=200, show_default=True, help="Problems."),
        click.option(
            "--stream", type=click.Choice(list(STREAMS)), default="calibration", show_default=True
        ),
        click.option("--draft", help="Folder of another draft."),
        click.option("--target", help="Folder of another target."),
        click.option("--backend", default="cpu", show_default=True),
    ):
        command = option(command)
    return command


def pair(backend: str, draft: str | None, target: str | None) -> Solver:
    """The built-in pair, or its settings with other weights."""
    if draft is None and target is None:
        return load(BUILT_IN_PAIR, backend=backend, draft_cost=None)
    own = find_pair(BUILT_IN_PAIR)
    folders = own.sources("torch")
    return load(
        draft=draft or folders[0],
        target=target or folders[1],
        backend=backend,
        num_candidates=own.num_candidates,
        selector=own.selector,
        verifier=own.verifier,
        draft_cost=None,
    )


@click.group()
def main() -> None:
    """Measure the built-in pair."""


@main.command()
@run_options
@click.option("--embedder", "embedders", multiple=True, default=("draft", "ngram", "numbers"))
def collect(
    output: Path,
    count: int,
    stream: str,
    draft: str | None,
    target: str | None,
    backend: str,
    embedders: tuple[str, ...],
) -> None:
    """Sample draft steps after right prefixes and write down every signal on them."""
    found = steps.collect(pair(backend, draft, target), embedders, STREAMS[stream], count, output)
    click.echo(f"{len(found)} steps of {count} problems in {output}")


def _steps_of(file: Path, kind: str) -> list[dict[str, Any]]:
    rows = steps.steps_of(read_lines(file)[1:])
    return [row for row in rows if row["is_answer"] is KINDS[kind]]


file_argument = click.argument("file", type=click.Path(exists=True, path_type=Path))
kind_option = click.option(
    "--kind", type=click.Choice(list(KINDS)), default="steps", show_default=True
)


@main.command()
@file_argument
@kind_option
@click.option("--embedder", default="draft", show_default=True, help="For the consistency.")
@click.option("--match", default="", help="Only signals with this in their names.")
def signals(file: Path, kind: str, embedder: str, match: str) -> None:
    """AUC of each signal for "this draft step is right", overall and by kind of error."""
    found = judged.with_ensembles(judged.sample(_steps_of(file, kind), embedder))
    counts = {error: found.errors.count(error) for error in dict.fromkeys(found.errors)}
    click.echo(f"{len(found.errors)} sampled steps: " + ", ".join(map(str, counts.items())))
    kinds = [error for error, number in counts.items() if error is not None and number >= 10]
    click.echo("| signal | AUC | 95% interval | within a step | " + " | ".join(kinds) + " |")
    click.echo("|---" * (4 + len(kinds)) + "|")
    names = [name for name in found.values if match in name]
    by_kind = {error: found.only(error) for error in kinds}
    for name, area, low, high in judged.table(found, names):
        areas = [f"{judged.auc(part.values[name], part.is_right):.3f}" for part in by_kind.values()]
        within = f"{found.within_steps(name):.3f}"
        cells = [name, f"{area:.3f}", f"{low:.3f} - {high:.3f}", within, *areas]
        click.echo("| " + " | ".join(cells) + " |")


@main.command()
@file_argument
@kind_option
def selectors(file: Path, kind: str) -> None:
    """How often the selected candidate is right, by selector and k."""
    found = selection.table(_steps_of(file, kind), steps.NUM_SAMPLES)
    click.echo("| selector | " + " | ".join(f"k = {k}" for k in steps.NUM_SAMPLES) + " |")
    click.echo("|---" * (1 + len(steps.NUM_SAMPLES)) + "|")
    for name in dict.fromkeys(row[0] for row in found):
        cells = [
            f"{share:.1%} ({low:.1%} - {high:.1%})"
            for other, _, share, low, high in found
            if other == name
        ]
        click.echo("| " + " | ".join([name, *cells]) + " |")


@main.command()
@file_argument
@kind_option
@click.option("--signal", default="target log_prob", show_default=True)
@click.option("--select", help="Only the candidate with the highest value of this signal.")
def cuts(file: Path, kind: str, signal: str, select: str | None) -> None:
    """Share of right and of wrong draft steps that lie above each value of a signal."""
    rows = _steps_of(file, kind)
    found = judged.best(rows, select) if select else judged.sample(rows, "draft")
    values, is_right = found.values[signal], found.is_right
    click.echo(f"{len(values)} steps, {is_right.mean():.1%} right")
    click.echo("| value | right above | wrong above | right among those above |")
    click.echo("|---|---|---|---|")
    for cut in np.quantile(values[~is_right], [0.5, 0.8, 0.9, 0.95, 0.98, 0.99]):
        above = values >= cut
        click.echo(
            f"| {cut:.3f} | {above[is_right].mean():.1%} | {above[~is_right].mean():.1%} "
            f"| {is_right[above].mean():.1%} |"
        )


@main.command()
@run_options
@click.option(
    "--table",
    type=click.Choice(["weights", "layers"]),
    default="weights",
    show_default=True,
    help="Weight and threshold, or layers and epsilon.",
)
def sensitivity(
    output: Path,
    count: int,
    stream: str,
    draft: str | None,
    target: str | None,
    backend: str,
    table: str,
) -> None:
    """Solve problems by the paper's ensemble with other settings; OUTPUT is a folder."""
    solver = pair(backend, draft, target)
    base = solver.config
    if table == "weights":
        methods = weight_and_threshold(base)
    else:
        assert solver.target is not None
        methods = layers_and_epsilon(base, steps.num_layers_of(solver.target))
    found = islice(problems.stream(STREAMS[stream]), count)
    items = [Item(str(i), item.text, str(item.answer)) for i, item in enumerate(found)]
    run = Run(solver, DataSet(stream, tuple(items)), methods, [0], output, backend)
    try:
        for number, _ in enumerate(run.rows_to_come(), 1):
            if number % 100 == 0:
                click.echo(f"{run.num_missing - number} solutions to come", err=True)
    finally:
        run.close()
    click.echo(as_markdown(summarise(run.rows, (0, 1))), nl=False)


if __name__ == "__main__":
    try:
        main()
    except SpecguardError as error:
        sys.exit(f"Error: {error.message}. {error.hint or ''}")

"""Command line of the measurements; each one goes on where it was stopped."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from specguard import Engine, load
from specguard.core.errors import SpecguardError
from specguard.models.pairs import BUILT_IN_PAIR, find_pair
from specguard.models.tiny import problems
from specguard.models.tiny.evidence import methods as tables
from specguard.models.tiny.evidence import selection, steps
from specguard.models.tiny.evidence import signals as judged
from specguard.models.tiny.evidence.journal import read_rows
from specguard.models.tiny.evidence.statistics import auc

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


def pair(backend: str, draft: str | None, target: str | None) -> Engine:
    """The built-in pair, or its settings with other weights."""
    if draft is None and target is None:
        return load(BUILT_IN_PAIR, backend=backend)
    own = find_pair(BUILT_IN_PAIR)
    folders = own.sources("torch")
    return load(
        draft=draft or folders[0],
        target=target or folders[1],
        backend=backend,
        num_candidates=own.num_candidates,
        selector=own.selector,
        verifier=own.verifier,
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
    return [row for row in read_rows(file) if row["is_answer"] is KINDS[kind]]


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
    found = judged.sample(_steps_of(file, kind), embedder)
    counts = {error: found.errors.count(error) for error in dict.fromkeys(found.errors)}
    click.echo(f"{len(found.errors)} sampled steps: " + ", ".join(map(str, counts.items())))
    kinds = [error for error, number in counts.items() if error is not None and number >= 10]
    click.echo("| signal | AUC | 95% interval | " + " | ".join(kinds) + " |")
    click.echo("|---" * (3 + len(kinds)) + "|")
    names = [name for name in found.values if match in name]
    by_kind = {error: found.only(error) for error in kinds}
    for name, area, low, high in judged.table(found, names):
        areas = [f"{auc(part.values[name], part.is_right):.3f}" for part in by_kind.values()]
        cells = [name, f"{area:.3f}", f"{low:.3f} - {high:.3f}", *areas]
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


TABLES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "main": tables.main_table,
    "k": tables.over_k,
    "grid": tables.grid,
    "layers": lambda own: tables.layers(own, 4),
}


@main.command()
@run_options
@click.option("--table", "name", type=click.Choice(list(TABLES)), default="main")
@click.option("--method", "only", multiple=True, help="A row of the table; all without it.")
def methods(
    output: Path,
    count: int,
    stream: str,
    draft: str | None,
    target: str | None,
    backend: str,
    name: str,
    only: tuple[str, ...],
) -> None:
    """Solve problems by every method of a table."""
    rows = TABLES[name](find_pair(BUILT_IN_PAIR).verifier)
    wanted = {key: rows[key] for key in only or rows}
    engine = pair(backend, draft, target)
    for left in tables.run(engine, wanted, STREAMS[stream], count, output):
        if left % 50 == 0:
            click.echo(f"{left} solutions to come", err=True)
    for line in tables.table([row for row in read_rows(output) if row["method"] in wanted]):
        click.echo(line)


if __name__ == "__main__":
    try:
        main()
    except SpecguardError as error:
        sys.exit(f"Error: {error.message}. {error.hint or ''}")

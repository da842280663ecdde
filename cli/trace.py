"""``specguard trace``: a solution as a page to look at."""

import json
from pathlib import Path

import click

from specguard.core.errors import SpecguardError
from specguard.core.records import Solution
from specguard.files import write_atomically


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Where to write the page [FILE with .html for its ending].",
)
def trace(file: Path, output: Path | None) -> None:
    """Write the page of a solution in FILE, what solve --json --detail has printed."""
    output = output or file.with_suffix(".html")
    if output == file:
        raise SpecguardError(f"{file} would be overwritten", "name another file: --output")
    write_trace(_read(file), output)
    click.echo(output)


def write_trace(solution: Solution, path: Path) -> None:
    """Write a solution's page.

    Raises:
        SpecguardError: it cannot be written.
    """
    from specguard.trace import render

    try:
        write_atomically(path, render(solution).encode())
    except OSError as error:
        raise SpecguardError(f"{path} cannot be written: {error.strerror}") from error


def _read(file: Path) -> Solution:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecguardError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SpecguardError(
            f"{file} is no JSON: {error}", "it takes what specguard solve --json --detail prints"
        ) from error
    if not isinstance(data, dict):
        raise SpecguardError(f"{file} holds no solution")
    return Solution.from_dict(data)

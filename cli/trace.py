"""``specguard trace``: a solution as a page to look at."""

import json
from pathlib import Path

import click

from specguard.core.errors import SpecguardError
from specguard.core.records import Solution
from specguard.files import (
    cannot_write,
    check_input_file,
    check_output_file,
    write_atomically,
)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    show_default="FILE with .html for its ending",
    help="Where to write the page.",
)
def trace(file: Path, output: Path | None) -> None:
    """Write the page of a solution in FILE, what solve --json --detail has printed."""
    check_input_file(file)
    output = output or file.with_suffix(".html")
    if output == file or (output.exists() and output.samefile(file)):
        raise SpecguardError(f"{file} would be overwritten", "name another file: --output")
    check_output_file(output)
    write_trace(_read(file), output)
    click.echo(click.format_filename(output))


def write_trace(solution: Solution, path: Path) -> None:
    """Write a solution's page.

    Raises:
        SpecguardError: it cannot be written.
    """
    from specguard.trace import render

    try:
        write_atomically(path, render(solution).encode(errors="replace"))
    except OSError as error:
        raise cannot_write(path, error) from error


def _read(file: Path) -> Solution:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecguardError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SpecguardError(
            f"{file} is no JSON: {error}", "it takes what specguard solve --json --detail prints"
        ) from error
    if not isinstance(data, dict):
        raise SpecguardError(f"{file} holds no solution")
    return Solution.from_dict(data)

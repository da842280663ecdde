"""Options that name a data set, and how they become one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from specguard.bench.datasets import BUILT_IN, SOURCES, DataSet, Fields, load_dataset
from specguard.cli.output import console
from specguard.cli.values import COUNT
from specguard.core.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


def data_options(command: F) -> F:
    """Which problems."""
    for option in reversed(
        (
            click.option(
                "--dataset",
                type=click.Choice([BUILT_IN, *SOURCES]),
                show_default=BUILT_IN,
                help=f"From the hub, but for {BUILT_IN}.",
            ),
            click.option(
                "--data", type=click.Path(path_type=Path), help="A JSONL file of problems."
            ),
            click.option("--fields", help="Of --data: problem=NAME,answer=NAME[,id=NAME]."),
            click.option(
                "--limit", type=COUNT, show_default="all", help="So many problems at most."
            ),
        )
    ):
        command = option(command)
    return command


def read_data(
    dataset: str | None, data: Path | None, fields: str | None, limit: int | None
) -> DataSet:
    """The problems that the options name; what has to be left out is said on stderr.

    Raises:
        UsageError: options that do not go together.
        SpecguardError: a bad line, which is named.
    """
    if fields is not None and data is None:
        raise UsageError("--fields has no meaning without --data")
    found = load_dataset(dataset, data, _fields(fields), limit)
    err = console(stderr=True)
    for place in found.left_out:
        err.print(f"left out, {place}", style="yellow", markup=False)
    return found


def _fields(text: str | None) -> Fields | None:
    if text is None:
        return None
    given = dict(part.partition("=")[::2] for part in text.split(","))
    if not {"problem", "answer"} <= given.keys() <= {"problem", "answer", "id"} or not all(
        given.values()
    ):
        raise UsageError(
            f"--fields {text!r} is not understood", "like problem=question,answer=solution,id=key"
        )
    return Fields(given["problem"], given["answer"], given.get("id"))

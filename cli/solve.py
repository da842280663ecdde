"""``specguard solve``: solve one problem and show each step as it is decided."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import click

from specguard import Solution, Solver, UsageError
from specguard.cli.options import (
    ModelOptions,
    check_unicode,
    method_options,
    model_options,
    settings_from,
)
from specguard.cli.output import Reporter, console
from specguard.cli.trace import write_trace
from specguard.core.records import step_to_dict
from specguard.loading import configure


@click.command()
@click.argument("problem", required=False)
@click.option(
    "--file", "file", type=click.Path(path_type=Path), help="Read the problem from a file."
)
@model_options
@method_options
@click.option("--json", "as_json", is_flag=True, help="Print the solution as one JSON object.")
@click.option(
    "--jsonl", "as_jsonl", is_flag=True, help="Print one JSON event a line as it happens."
)
@click.option("--quiet", is_flag=True, help="Print the answer only.")
@click.option("--detail", is_flag=True, help="Keep candidates and token arrays in the JSON.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="Write a page that shows the candidates, scores and tokens of every step.",
)
def solve(
    problem: str | None,
    file: Path | None,
    models: ModelOptions,
    as_json: bool,
    as_jsonl: bool,
    quiet: bool,
    detail: bool,
    trace: Path | None,
    reward: str | None,
    **options: Any,
) -> None:
    """Solve PROBLEM, given as an argument, on standard input (-) or in a --file."""
    if as_json + as_jsonl + quiet > 1:
        raise UsageError("--json, --jsonl and --quiet exclude one another")
    if detail and not (as_json or as_jsonl):
        raise UsageError("--detail has no meaning without --json or --jsonl")
    if trace is not None and as_jsonl:
        raise UsageError("--trace and --jsonl exclude one another")
    text = read_problem(problem, file)
    choice = models.choose()
    settings = settings_from({**options, "reward": reward}, configure(choice.pair, models.profile))
    reporter = Reporter(is_silent=as_json or as_jsonl or quiet)
    with reporter.loading() as progress:
        solver = replace(models, pair=choice.pair.name if choice.pair else None).load(
            reward=reward,
            progress=progress,
            detail=detail or trace is not None,
            **settings,
        )
    if as_jsonl:
        _solve_as_jsonl(solver, text)
        return
    reporter.start(solver, choice)
    with solver.stream(text) as steps:
        for step in steps:
            reporter.step(step)
    solution = steps.solution
    assert solution is not None
    if trace is not None:
        write_trace(solution, trace)
    if as_json:
        click.echo(solution.to_json(indent=2))
    elif quiet:
        _print_answer(solution)
    else:
        reporter.finish(solution)


def read_problem(problem: str | None, file: Path | None) -> str:
    """The problem's text, wherever it was given.

    Raises:
        UsageError: given twice or not at all, unreadable, not UTF-8, or blank.
    """
    if (problem is None) == (file is None):
        raise UsageError(
            "give one problem, as an argument or with --file",
            'specguard solve "Mia has 24 shells. ..."',
        )
    if file is not None:
        try:
            with file.open("rb") as stream:
                text = _decode(stream, str(file))
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    elif problem == "-":
        if sys.stdin is None:
            raise UsageError("standard input is closed")
        text = _decode(sys.stdin.buffer, "standard input")
    else:
        assert problem is not None
        text = problem
        check_unicode(text, "the problem")
    if not text.strip():
        raise UsageError("the problem is empty")
    return text


def _decode(stream: BinaryIO, name: str) -> str:
    content = stream.read()
    if b"\0" in content:
        raise UsageError(f"{name} is binary, not text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not valid UTF-8 (byte {error.start})") from error


def _solve_as_jsonl(solver: Solver, problem: str) -> None:
    def emit(event: str, data: dict[str, Any]) -> None:
        click.echo(json.dumps({"event": event, **data}, ensure_ascii=False))

    with solver.stream(problem) as steps:
        for step in steps:
            emit("step", step_to_dict(step))
    assert steps.solution is not None
    emit("solution", steps.solution.to_dict())


def _print_answer(solution: Solution) -> None:
    if solution.answer is None:
        console(stderr=True).print(f"no answer: finished by {solution.finish_reason}")
        raise click.exceptions.Exit(1)
    click.echo(solution.answer)

"""``specguard solve``: solve one problem and show each step as it is decided."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import click

from specguard import UsageError
from specguard.cli.options import (
    ModelOptions,
    check_unicode,
    method_options,
    model_options,
    settings_from,
)
from specguard.cli.output import Reporter
from specguard.cli.trace import write_trace
from specguard.core.records import step_to_dict
from specguard.files import check_output_file
from specguard.loading import Choice

EXIT_NO_ANSWER = 3
_MAX_BYTES = 1 << 24  # of a problem: no context window holds more


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
@click.option(
    "--force", is_flag=True, help="Try a problem that the built-in pair was not made for."
)
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
    force: bool,
    detail: bool,
    trace: Path | None,
    reward: str | None,
    **options: Any,
) -> None:
    """Solve PROBLEM, given as an argument, on standard input or in a --file.

    A problem that begins with a minus sign stands behind --, by itself.
    """
    if as_json + as_jsonl + quiet > 1:
        raise UsageError("--json, --jsonl and --quiet exclude one another")
    if detail and not (as_json or as_jsonl):
        raise UsageError("--detail has no meaning without --json or --jsonl")
    if trace is not None and as_jsonl:
        raise UsageError("--trace and --jsonl exclude one another")
    if trace is not None:
        check_output_file(trace)
    text = read_problem(problem, file)
    reporter = Reporter(is_silent=as_json or as_jsonl, is_quiet=quiet)
    with reporter.loading() as progress:
        choice = models.choose()
        settings = settings_from({**options, "reward": reward}, choice)
        check_problem(choice, text, force)
        solver = replace(models, pair=choice.pair.name if choice.pair else None).load(
            reward=reward,
            progress=progress,
            detail=detail or trace is not None,
            **settings,
        )
    reporter.start(solver, choice)
    with (
        reporter.solving(solver.config.method) as hear,
        solver.stream(text, on_progress=hear) as steps,
    ):
        for step in steps:
            reporter.step(step, solver.config)
            if as_jsonl:
                _emit("step", step_to_dict(step))
    solution = steps.solution
    assert solution is not None
    if as_jsonl:
        _emit("solution", solution.to_dict())
    elif as_json:
        click.echo(solution.to_json(indent=2))
    elif not quiet:
        reporter.finish(solution)
    elif solution.answer is not None:
        click.echo(solution.answer)
    if trace is not None:
        write_trace(solution, trace)
    if solution.answer is None:
        reporter.no_answer(solution)
        raise click.exceptions.Exit(EXIT_NO_ANSWER)


def _emit(event: str, data: dict[str, Any]) -> None:
    click.echo(json.dumps({"event": event, **data}, ensure_ascii=False))


def check_problem(choice: Choice, problem: str, force: bool = False) -> None:
    """Refuse a problem that the chosen pair was not made for, before anything is loaded.

    Raises:
        UsageError: it is outside of what the pair knows and not forced; or any is taken anyway.
    """
    if choice.pair is None or choice.pair.check is None:
        if force:
            raise UsageError("--force has no meaning: these models take any problem")
        return
    if force:
        return
    try:
        choice.pair.check(problem)
    except UsageError as error:
        raise UsageError(error.message, f"{error.hint}; or try it all the same: --force") from error


def read_problem(problem: str | None, file: Path | None) -> str:
    """The problem's text, wherever it was given.

    Raises:
        UsageError: given twice or not at all, unreadable, not UTF-8, or blank.
    """
    is_piped = sys.stdin is not None and not sys.stdin.isatty()
    if (file is None and problem is None and not is_piped) or (file and problem is not None):
        raise _none_given()
    if file is not None:
        try:
            with file.open("rb") as stream:
                text = _decode(stream, str(file))
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    elif problem == "-" or problem is None:
        if sys.stdin is None:
            raise UsageError("standard input is closed")
        text = _decode(sys.stdin.buffer, "standard input")
        if problem is None and not text.strip():
            raise _none_given()
    else:
        assert problem is not None
        text = problem
        check_unicode(text, "the problem")
    if not text.strip():
        raise UsageError("the problem is empty")
    return text


def _none_given() -> UsageError:
    return UsageError(
        "give one problem, as an argument, with --file or on standard input",
        'specguard solve "Mia has 24 shells. ..."',
    )


def _decode(stream: BinaryIO, name: str) -> str:
    content = stream.read(_MAX_BYTES + 1)
    if b"\0" in content:
        raise UsageError(f"{name} is binary, not text")
    if len(content) > _MAX_BYTES:
        raise UsageError(f"{name} is too long for a problem", f"at most {_MAX_BYTES} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not valid UTF-8 (byte {error.start})") from error

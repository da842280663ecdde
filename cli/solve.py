"""``specguard solve``: solve one problem and show each step as it is decided."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import click

from specguard import UsageError
from specguard.cli.method_options import check_unicode, method_options, settings_from
from specguard.cli.model_options import ModelOptions, model_options
from specguard.cli.output import Reporter
from specguard.cli.problems import (
    EXIT_NO_ANSWER,
    ManyOptions,
    check_problem,
    many_options,
    solve_file,
)
from specguard.cli.trace import write_trace
from specguard.core.records import step_to_dict
from specguard.files import check_output_file

_MAX_BYTES = 1 << 24  # of a problem: no context window holds more


@click.command()
@click.argument("problem", required=False)
@click.option(
    "--file", "file", type=click.Path(path_type=Path), help="Read the problem from a file."
)
@many_options
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
    many: ManyOptions,
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
    """Solve PROBLEM, given as an argument, on standard input or in a --file; or many --problems.

    A problem that begins with a minus sign stands behind --, by itself.
    """
    if many.problems is not None:
        if as_json or as_jsonl or trace is not None or file is not None or problem is not None:
            raise UsageError(
                "--problems excludes a PROBLEM, --file, --json, --jsonl and --trace",
                "solutions are JSON, a line each, on standard output or in the folder --output",
            )
        if quiet and many.output is not None:
            raise UsageError("--quiet has no meaning with --output: nothing is printed there")
        reporter = Reporter(is_silent=many.output is None, is_quiet=quiet)
        choice = models.choose()
        settings = settings_from({**options, "reward": reward}, choice)
        more = {"reward": reward, "detail": detail, **settings}
        solve_file(many, models, choice, more, reporter, force)
        return
    many.refuse_without_problems()
    if as_json + as_jsonl + quiet > 1:
        raise UsageError("--json, --jsonl and --quiet exclude one another")
    if detail and not (as_json or as_jsonl):
        raise UsageError("--detail has no meaning without --json, --jsonl or --problems")
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

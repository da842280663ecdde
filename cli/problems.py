"""``specguard solve --problems``: many problems from a file, side by side."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click
from click.exceptions import Exit

from specguard import UsageError
from specguard.cli.model_options import ModelOptions
from specguard.cli.output import Reporter, progress_bar
from specguard.cli.values import COUNT, Number, Part
from specguard.core import Finished, Solver, SpecguardError
from specguard.files import check_output_folder
from specguard.loading import Choice
from specguard.problems import (
    Problem,
    ProblemRun,
    Shard,
    read_problems,
    solution_row,
    solve_problems,
)

F = TypeVar("F", bound=Any)

EXIT_FAILED, EXIT_NO_ANSWER = 1, 3
_SHOWN = 60  # characters of a problem's id


@dataclass(frozen=True, slots=True)
class ManyOptions:
    """What the options of a file of problems say; None is not given."""

    problems: Path | None
    fields: str | None
    output: Path | None
    shard: tuple[int, int] | None
    batch_size: int | None
    memory_budget: int | None
    time_limit: float | None

    def refuse_without_problems(self) -> None:
        """Options of many problems mean nothing for one.

        Raises:
            UsageError: one of them is given.
        """
        for field in fields(self):
            if getattr(self, field.name) is not None:
                flag = "--" + field.name.replace("_", "-")
                raise UsageError(f"{flag} has no meaning without --problems")


def many_options(command: F) -> F:
    """Many problems in place of one: the command's parameter ``many``."""

    @wraps(command)
    def with_many(**options: Any) -> None:
        given = {field.name: options.pop(field.name) for field in fields(ManyOptions)}
        command(many=ManyOptions(**given), **options)

    wrapped: Any = with_many
    for option in reversed(
        (
            click.option(
                "--problems",
                type=click.Path(path_type=Path),
                help="Solve many problems: of a .jsonl file, or of any other file a line each.",
            ),
            click.option("--fields", help="Of a .jsonl file: problem=NAME[,id=NAME]."),
            click.option(
                "--output",
                type=click.Path(path_type=Path, file_okay=False),
                show_default="standard output, a JSON object a line",
                help="Folder of the solutions; the same command goes on where it was stopped.",
            ),
            click.option(
                "--shard",
                type=Part(),
                metavar="I/N",
                help="Every N-th problem only, from the I-th on: a share for one of N machines.",
            ),
            click.option("--batch-size", type=COUNT, show_default="8", help="Problems at a time."),
            click.option(
                "--memory-budget",
                type=COUNT,
                metavar="MIB",
                help="Most memory for their keys and values; problems wait until there is room.",
            ),
            click.option(
                "--time-limit",
                type=Number(0, min_open=True),
                metavar="SECONDS",
                help="Most time of a problem; one that takes longer has failed.",
            ),
        )
    ):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


def solve_file(
    options: ManyOptions,
    models: ModelOptions,
    choice: Choice,
    settings: Mapping[str, Any],
    reporter: Reporter,
    force: bool,
) -> None:
    """Solve a file of problems; exit 1 where some failed, else 3 where some have no answer.

    Raises:
        UsageError: options that do not go together, or problems that the pair was not made for.
        SpecguardError: a bad line, or a folder of other solutions.
    """
    assert options.problems is not None
    wanted = _fields(options)
    if options.output is not None:
        check_output_folder(options.output)
    problems = read_problems(options.problems, **wanted)
    shard = Shard(*options.shard) if options.shard else Shard()
    if not shard.of(problems):
        raise UsageError(f"the shard is empty: there are {len(problems)} problems")
    many: dict[str, Any] = {
        "batch_size": options.batch_size or 8,
        "time_limit": options.time_limit,
    }
    if options.memory_budget is not None:
        many["memory_budget"] = options.memory_budget * 2**20
    own = shard.of(problems)
    tally = _Tally(reporter, own, options.output)
    run = None if options.output is None else ProblemRun(options.output, problems, shard)
    with run or nullcontext():
        done = {} if run is None else run.rows
        tally.begin(done.values())
        missing = [problem for problem in own if problem.id not in done]
        missing = _fitting(choice, missing, force, tally)
        if missing:
            solver = _load(models, choice, settings, reporter)
            if run is None:
                tally.count(solve_problems(solver, missing, **many))
            else:
                run.check(solver)
                tally.count(run.outcomes(solver, missing, **many))
    tally.finish()


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


def _fields(options: ManyOptions) -> dict[str, str]:
    if options.fields is None:
        return {}
    assert options.problems is not None
    if options.problems.suffix != ".jsonl":
        raise UsageError("--fields has no meaning without a .jsonl file: lines have no fields")
    given = dict(part.partition("=")[::2] for part in options.fields.split(","))
    if not {"problem"} <= given.keys() <= {"problem", "id"} or not all(given.values()):
        raise UsageError(
            f"--fields {options.fields!r} is not understood", "like problem=question,id=key"
        )
    return {"field": given["problem"]} | ({"id_field": given["id"]} if "id" in given else {})


def _fitting(
    choice: Choice, problems: Sequence[Problem], force: bool, tally: "_Tally"
) -> list[Problem]:
    """Those that the pair was made for; the others have failed, all of them is an error."""
    fitting, error = [], None
    for problem in problems:
        try:
            check_problem(choice, problem.text, force)
        except UsageError as refusal:
            if force:  # which has no meaning here
                raise
            error = refusal
            tally.fail(problem, refusal)
        else:
            fitting.append(problem)
    if error is not None and not fitting and not tally.num_solved:
        raise UsageError("the pair was made for none of these problems", error.hint)
    return fitting


def _load(
    models: ModelOptions, choice: Choice, settings: Mapping[str, Any], reporter: Reporter
) -> Solver:
    with reporter.loading() as progress:
        solver = replace(models, pair=choice.pair.name if choice.pair else None).load(
            progress=progress, **settings
        )
    reporter.start(solver, choice)
    return solver


class _Tally:
    """Shows outcomes as they come, and sums them up."""

    def __init__(
        self, reporter: Reporter, problems: Sequence[Problem], output: Path | None
    ) -> None:
        self._reporter, self._output = reporter, output
        self._num_problems = len(problems)
        self._answers = _Answers(problems) if reporter.is_quiet else None
        self.num_solved = self._num_before = self._num_failed = self._num_blank = 0
        self._num_tokens = self._num_written = 0

    def begin(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Count what is there from before."""
        for row in rows:
            self._add(row)
        self._num_before = self.num_solved

    def fail(self, problem: Problem, error: SpecguardError) -> None:
        """One line for a problem that came to nothing."""
        self._num_failed += 1
        hint = f" ({error.hint})" if error.hint else ""
        message = " ".join(f"{error.message}{hint}".split())
        self._reporter.err.print(
            f"Problem {problem.id:.{_SHOWN}}: {message}", markup=False, style="yellow"
        )
        if self._answers is not None:
            self._answers.add(problem, "")

    def count(self, outcomes: Iterator[tuple[Problem, Finished]]) -> None:
        """Take outcomes as they come."""
        with progress_bar(self._reporter.err, is_shown=not self._reporter.is_quiet) as progress:
            bar = progress.add_task("", total=self._num_problems, completed=self.num_solved)
            try:
                for problem, outcome in outcomes:
                    self._take(problem, outcome)
                    progress.update(bar, advance=1, description=self._written)
            except KeyboardInterrupt:
                if self._output is not None:
                    # Without a count: a solution may be on the disk and not be counted yet.
                    progress.console.print(
                        "What is solved is kept; the same command goes on from there.",
                        markup=False,
                    )
                raise

    def finish(self) -> None:
        """Sum up, and end with the exit code."""
        parts = [f"{self.num_solved} of {self._num_problems} solved"]
        if self._num_before:
            parts[0] += f", {self._num_before} of them before"
        if self._num_blank:
            parts.append(f"{self._num_blank} without an answer")
        if self._num_failed:
            again = "" if self._output is None else " (the same command tries them again)"
            parts.append(f"{self._num_failed} failed{again}")
        parts.append(self._written)
        if self._num_failed or not self._reporter.is_quiet:
            self._reporter.err.print(" | ".join(filter(None, parts)), style="dim", markup=False)
        if self._num_failed:
            raise Exit(EXIT_FAILED)
        if self._num_blank:
            raise Exit(EXIT_NO_ANSWER)

    @property
    def _written(self) -> str:
        if not self._num_tokens:
            return ""
        return f"target wrote {self._num_written / self._num_tokens:.0%} of the tokens"

    def _take(self, problem: Problem, outcome: Finished) -> None:
        if outcome.error is not None:
            self.fail(problem, outcome.error)
            return
        assert outcome.solution is not None
        row = solution_row(problem, outcome.solution)
        self._add(row)
        if self._answers is not None:
            self._answers.add(problem, outcome.solution.answer or "")
        elif self._output is None:
            click.echo(json.dumps(row, ensure_ascii=False))

    def _add(self, row: Mapping[str, Any]) -> None:
        self.num_solved += 1
        self._num_blank += row["answer"] is None
        self._num_tokens += row["stats"]["num_tokens"]
        self._num_written += row["stats"]["num_target_tokens"]


class _Answers:
    """Prints answers in the order of their problems, an empty line for none."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._ids = [problem.id for problem in reversed(problems)]
        self._known: dict[str, str] = {}

    def add(self, problem: Problem, answer: str) -> None:
        """Print what is known up to the first problem that is still open."""
        self._known[problem.id] = answer
        while self._ids and self._ids[-1] in self._known:
            click.echo(" ".join(self._known.pop(self._ids.pop()).split()))

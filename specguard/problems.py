"""Many problems from a file, their solutions in a folder: each on the disk as soon as it is there.

Started again, a run goes on: no problem is solved twice, whatever its shard was before.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specguard.core import Finished, Solver, SpecguardError, solve_many
from specguard.core.config import SolveConfig, changed_settings
from specguard.core.records import Solution
from specguard.journal import Journal, read_lines
from specguard.jsonl import decode_line, read_rows, text_from
from specguard.jsonl import read_lines as lines_of

PROBLEM_FIELD = "problem"
_KIND = ("schema_version", "config", "draft", "target")


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem of a file; ``id`` is unique there: its own, or its number among them from 1."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Shard:
    """Part ``number`` of ``count`` equal ones: every ``count``-th problem, from 1 on."""

    number: int = 1
    count: int = 1

    def of(self, problems: Sequence[Problem]) -> Sequence[Problem]:
        """Its problems."""
        return problems[self.number - 1 :: self.count]

    @property
    def file_name(self) -> str:
        """Where its solutions are kept."""
        part = "" if self.count == 1 else f"-{self.number}-of-{self.count}"
        return f"solutions{part}.jsonl"


def read_problems(
    file: Path, field: str = PROBLEM_FIELD, id_field: str | None = None
) -> tuple[Problem, ...]:
    """The problems of a JSONL file (by its suffix), or of any other file a line each.

    Raises:
        SpecguardError: a bad line, which is named, an id that is there twice, or no problem at all.
    """
    rows = _rows(file, field, id_field) if file.suffix == ".jsonl" else _lines(file)
    problems: dict[str, Problem] = {}
    for number, (place, problem_id, text) in enumerate(rows, 1):
        problem = Problem(str(number) if problem_id is None else problem_id, text)
        if problem.id in problems:
            raise SpecguardError(f"{place} has an id that was there before: {problem.id!r:.60}")
        problems[problem.id] = problem
    if not problems:
        raise SpecguardError(f"{file} holds no problem")
    return tuple(problems.values())


def _lines(file: Path) -> Iterator[tuple[str, None, str]]:
    for place, line in lines_of(file):
        if b"\0" in line:
            raise SpecguardError(f"{place} is binary, not text")
        yield place, None, decode_line(line, place).strip()


def _rows(file: Path, field: str, id_field: str | None) -> Iterator[tuple[str, str | None, str]]:
    for place, row in read_rows(file):
        if not isinstance(row, dict):
            raise SpecguardError(f"{place} is no JSON object")
        for name in filter(None, (field, id_field)):
            if name not in row:
                raise SpecguardError(
                    f"{place} has no field {name!r}",
                    f"its fields: {', '.join(map(str, row))}; say which with --fields problem=NAME",
                )
        try:
            text = text_from(row[field])
            problem_id = None if id_field is None else text_from(str(row[id_field]))
        except TypeError as error:
            raise SpecguardError(f"{place}: {error}") from error
        if not text.strip():
            raise SpecguardError(f"{place} has an empty problem")
        yield place, problem_id, text


class ProblemRun:
    """The solutions of one shard in a folder; iterating over `outcomes` makes those that miss.

    The file holds solutions as JSON has them, with the problem's ``id`` before them; ``rows`` are
    those of the shard by id, without their steps. Problems that failed
    leave no row: the next run tries them again. A context manager: meanwhile no other run writes to
    the same shard.

    Raises:
        SpecguardError: the folder holds solutions of other problems, models or settings, or is in
            use.
    """

    def __init__(self, folder: Path, problems: Sequence[Problem], shard: Shard) -> None:
        self._texts = {problem.id: problem.text for problem in shard.of(problems)}
        self._journal = Journal(folder / shard.file_name)
        self._journal.rows.clear()
        try:
            self.rows = self._rows_of(folder)
            self._check_texts()
        except BaseException:
            self._journal.close()
            raise

    def __enter__(self) -> "ProblemRun":
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    def check(self, solver: Solver) -> None:
        """Refuse to mix solutions of other models or settings.

        What drafting costs may differ: each machine has figures of its own.
        """
        wanted = _key(solver.config, solver.draft, solver.target)
        kinds = {json.dumps([row.get(name) for name in _KIND]): row for row in self.rows.values()}
        for row in kinds.values():
            solution = Solution.from_dict({**row, "steps": []})
            there = _key(solution.config, solution.draft, solution.target)
            if there != wanted:
                changes = ", ".join(name for name in wanted if there[name] != wanted[name])
                raise SpecguardError(
                    f"the folder holds solutions with another {changes}",
                    "give the settings of that run, or name another output",
                )

    def outcomes(
        self, solver: Solver, problems: Sequence[Problem], **many: Any
    ) -> Iterator[tuple[Problem, Finished]]:
        """As `solve_problems`; each solution is on the disk when it is yielded."""
        for problem, outcome in solve_problems(solver, problems, **many):
            if outcome.solution is not None:
                row = solution_row(problem, outcome.solution)
                self._journal.append(row)
                self._journal.rows.clear()  # what is on the disk need not be held
                self.rows[problem.id] = _without_steps(row)
            yield problem, outcome

    def _rows_of(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Of this shard, from whichever files hold them: the division may have been another."""
        rows: dict[str, dict[str, Any]] = {}
        for file in sorted(folder.glob("solutions*.jsonl")):
            for row in read_lines(file):
                if row.get("id") in self._texts:
                    rows[row["id"]] = _without_steps(row)
        return rows

    def _check_texts(self) -> None:
        for problem_id, row in self.rows.items():
            if row.get("problem") != self._texts[problem_id]:
                raise SpecguardError(
                    f"the folder holds a solution of another problem {problem_id!r:.60}",
                    "name another output: the file of problems has changed",
                )


def solve_problems(
    solver: Solver, problems: Sequence[Problem], **many: Any
) -> Iterator[tuple[Problem, Finished]]:
    """Each with what became of it, as it ends; ``many`` are arguments of `solve_many`.

    Raises:
        UsageError: an argument that `solve_many` refuses.
    """
    with closing(solve_many(solver, [problem.text for problem in problems], **many)) as finished:
        for outcome in finished:
            yield problems[outcome.index], outcome


def solution_row(problem: Problem, solution: Solution) -> dict[str, Any]:
    """A line of the file of solutions; `Solution.from_dict` reads it."""
    return {"id": problem.id, **solution.to_dict()}


def _without_steps(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "steps"}


def _key(config: SolveConfig, *models: Any) -> dict[str, Any]:
    names = [getattr(model, "name", model) for model in models]
    settings = changed_settings(replace(config, draft_cost=None, detail=False))
    return {"draft": names[0], "target": names[1], "setting": settings}

"""Solve a data set by several methods, problem by problem, each row kept as soon as it is there."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specguard.bench.datasets import DataSet, Item
from specguard.bench.grading import Grader, clean
from specguard.bench.journal import Journal
from specguard.bench.methods import Method
from specguard.core import Engine
from specguard.core.errors import SpecguardError
from specguard.core.records import Solution

FILE_NAME = "results.jsonl"


class Run:
    """One benchmark in a folder; iterating over `rows_to_come` does what is missing.

    All methods solve a problem before the next problem begins, so that a run that is cut short
    compares them on the same problems. Started again with the same settings it computes nothing
    twice; more problems, methods or seeds may be added.

    Raises:
        SpecguardError: the folder holds a run with other settings or is in use.
    """

    def __init__(
        self,
        engine: Engine,
        data: DataSet,
        methods: Sequence[Method],
        seeds: Sequence[int],
        folder: Path,
        backend: str,
    ) -> None:
        self.engine, self.data, self.methods = engine, data, methods
        settings = {
            "dataset": data.name,
            "backend": backend,
            "draft": engine.draft.name if engine.draft else None,
            "target": engine.target.name if engine.target else None,
        }
        self.journal = Journal(folder / FILE_NAME, settings)
        try:
            self._check_configs()
        except BaseException:
            self.journal.close()
            raise
        done = {(row["method"], row["seed"], row["id"]) for row in self.journal.rows}
        self._missing = [
            (item, method, seed)
            for item in data.items
            for seed in seeds
            for method in methods
            if (seed == seeds[0] or method.is_random(engine.config))
            and (method.name, seed, item.id) not in done
        ]

    @property
    def num_missing(self) -> int:
        """Solutions still to come."""
        return len(self._missing)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows of this run's methods and problems so far."""
        names, ids = {m.name for m in self.methods}, {item.id for item in self.data.items}
        return [row for row in self.journal.rows if row["method"] in names and row["id"] in ids]

    def rows_to_come(self) -> Iterator[dict[str, Any]]:
        """Work out what is missing; each row is on the disk when it is yielded."""
        with Grader() as grader:
            for item, method, seed in self._missing:
                row = self._solve(item, method, seed, grader)
                self.journal.append(row)
                yield row

    def close(self) -> None:
        """Let other runs use the folder."""
        self.journal.close()

    def _check_configs(self) -> None:
        """The same name must mean the same settings."""
        configs = {method.name: self._config_of(method) for method in self.methods}
        answers = {item.id: (item.problem, item.answer) for item in self.data.items}
        for row in self.journal.rows:
            if row["method"] in configs and row["config"] != configs[row["method"]]:
                raise SpecguardError(
                    f"method {row['method']!r} was run with other settings here",
                    "name another output to start anew, or give the settings of that run",
                )
            if row["id"] in answers and answers[row["id"]] != (row["problem"], row["gold"]):
                raise SpecguardError(
                    f"problem {row['id']!r} was another one here",
                    "name another output: the data set has changed",
                )

    def _config_of(self, method: Method) -> str:
        return f"{method.config(self.engine.config)!r}, votes {method.num_votes}"

    def _solve(self, item: Item, method: Method, seed: int, grader: Grader) -> dict[str, Any]:
        solutions = [
            self.engine.solve(
                item.problem, **{**method.changes, "seed": seed * method.num_votes + number}
            )
            for number in range(method.num_votes)
        ]
        answer = vote([solution.answer for solution in solutions])
        grade = grader.grade(answer, item.answer)
        return {
            "method": method.name,
            "seed": seed,
            "id": item.id,
            "problem": item.problem,
            "gold": item.answer,
            "answer": answer,
            "grade": grade.reason,
            "is_right": grade.is_right,
            "config": self._config_of(method),
            **_costs(solutions),
        }


def vote(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, ties to the first; solutions without one do not vote."""
    counts: dict[str, int] = {}
    first: dict[str, str] = {}
    for answer in answers:
        if answer is not None:
            key = "".join(clean(answer).split())
            counts[key] = counts.get(key, 0) + 1
            first.setdefault(key, answer)
    return first[max(counts, key=counts.__getitem__)] if counts else None


def _costs(solutions: Sequence[Solution]) -> dict[str, Any]:
    """Statistics of one solution, or their sums over several."""
    columns: dict[str, Any] = {}
    for solution in solutions:
        for name, value in asdict(solution.stats).items():
            if name == "phase_seconds":
                phases = columns.setdefault(name, {})
                for phase, seconds in value.items():
                    phases[phase] = phases.get(phase, 0.0) + seconds
            elif name.startswith("num_") or name == "seconds":
                columns[name] = columns.get(name, 0) + value
    columns["finish"] = [solution.finish_reason for solution in solutions]
    columns["num_verified_steps"] = sum(
        step.decision != "plain" for solution in solutions for step in solution.steps
    )
    columns["num_verified_step_tokens"] = sum(
        step.num_tokens
        for solution in solutions
        for step in solution.steps
        if step.decision != "plain"
    )
    return columns

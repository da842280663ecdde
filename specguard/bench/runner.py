"""Solve a data set by several methods, problem by problem, each row kept as soon as it is there."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

from specguard.bench.datasets import DataSet, Item
from specguard.bench.grading import Grader, clean
from specguard.bench.memory import peak_mebibytes
from specguard.bench.methods import Method
from specguard.core import Finished, RewardModel, Solver, Task, solve_many
from specguard.core.config import changed_settings
from specguard.core.errors import SpecguardError, UsageError
from specguard.core.records import Solution, Stats
from specguard.core.runner import Runner
from specguard.journal import Journal

FILE_NAME = "results.jsonl"
CONFIG_VERSION = 2  # grows where equal settings come to mean something else
_BATCHES_A_TURN = 4  # so that methods take turns, and batches are full most of the time
_MOST_MATCHED = 64

Job = tuple[Item, Method, int]  # the last one is the seed


class Run:
    """One benchmark in a folder; iterating over `rows_to_come` does what is missing.

    All methods solve a problem before the next problem begins, so that a run that is cut short
    compares them on the same problems; with a ``batch_size`` above 1 they take turns of a few
    batches. Started again with the same settings it computes nothing twice; more problems, methods
    or seeds may be added.

    Raises:
        UsageError: a method needs a model that is not there.
        SpecguardError: an engine cannot do what a method needs, or the folder holds a run with
            other settings or is in use.
    """

    def __init__(
        self,
        solver: Solver,
        data: DataSet,
        methods: Sequence[Method],
        seeds: Sequence[int],
        folder: Path,
        backend: str,
        batch_size: int = 1,
        memory_budget: int | None = None,
    ) -> None:
        self.solver, self.data, self.methods = solver, data, methods
        self._check_engines()
        settings: dict[str, Any] = {
            "dataset": data.name,
            "backend": backend,
            "draft": solver.draft.name if solver.draft else None,
            "target": solver.target.name if solver.target else None,
        }
        self.batch_size, self.memory_budget = batch_size, memory_budget
        if batch_size > 1:
            settings["batch_size"] = batch_size  # a time is since the outcome before it then
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
            if (seed == seeds[0] or method.is_random(solver.config))
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
            for turn in self._turns():
                for job, solutions in self._solve(turn):
                    row = self._row(*job, solutions, grader)
                    self.journal.append(row)
                    yield row

    def _turns(self) -> Iterator[list["Job"]]:
        """Jobs of one method that are done together."""
        if self.batch_size == 1:
            yield from ([job] for job in self._missing)
            return
        items = list(dict.fromkeys(item.id for item, _, _ in self._missing))
        for first in range(0, len(items), _BATCHES_A_TURN * self.batch_size):
            ids = set(items[first : first + _BATCHES_A_TURN * self.batch_size])
            for method in self.methods:
                turn = [job for job in self._missing if job[0].id in ids and job[1] is method]
                if turn:
                    yield turn

    def close(self) -> None:
        """Let other runs use the folder."""
        self.journal.close()

    def _check_engines(self) -> None:
        """What cannot be run is found before the first problem."""
        for method in self.methods:
            try:
                self.solver.pair.engines_for(method.config(self.solver.config))
            except SpecguardError as error:
                message = f"method {method.name!r} cannot be run: {error.message}"
                raise type(error)(message, "leave it out, or choose other models") from error

    def _check_configs(self) -> None:
        """The same name must mean the same settings.

        What drafting costs may differ: each machine has figures of its own.
        """
        configs = {method.name: _without_cost(self._config_of(method)) for method in self.methods}
        answers = {item.id: (item.problem, item.answer) for item in self.data.items}
        for row in self.journal.rows:
            if row["method"] in configs and _without_cost(row["config"]) != configs[row["method"]]:
                raise SpecguardError(
                    f"method {row['method']!r} was run with other settings here",
                    "name another output to start anew, or give the settings of that run",
                )
            if row["id"] in answers and answers[row["id"]] != (row["problem"], row["gold"]):
                raise SpecguardError(
                    f"problem {row['id']!r} was another one here",
                    "name another output: the data set has changed",
                )

    def _config_of(self, method: Method) -> dict[str, Any]:
        config: dict[str, Any] = {"version": CONFIG_VERSION}
        if method.has_samples:
            config |= {"samples": method.num_samples, "choice": method.choice}
            config |= {"matched": method.matched}
        return {**config, "settings": changed_settings(method.config(self.solver.config))}

    def _solve(self, turn: list["Job"]) -> Iterator[tuple["Job", list[Finished]]]:
        """Each job with its solutions, as soon as all of them are there."""
        if self.batch_size == 1 or turn[0][1].matched is not None:
            for job in turn:
                yield job, list(self._samples(*job))
            return
        tasks = [
            (job, Task(job[0].problem, {**job[1].changes, "seed": seed}))
            for job in turn
            for seed in _seeds(job[1], job[2])
        ]
        outcomes: dict[str, list[Finished]] = {}
        finished = solve_many(
            self.solver,
            [task for _, task in tasks],
            batch_size=self.batch_size,
            memory_budget=self.memory_budget,
        )
        with closing(finished):
            before = time.perf_counter()
            for outcome in finished:
                if isinstance(outcome.error, UsageError):  # it is the run's, not this problem's
                    raise outcome.error
                job = tasks[outcome.index][0]
                own = outcomes.setdefault(f"{job[0].id} {job[2]}", [])
                now = time.perf_counter()
                own.append(_timed(outcome, now - before))
                before = now
                if len(own) == job[1].num_samples:
                    yield job, sorted(own, key=lambda outcome: outcome.index)
                    before = time.perf_counter()

    def _samples(self, item: Item, method: Method, seed: int) -> Iterator[Finished]:
        """One solution after the other; where a time is matched, until it is best matched."""
        limit = None if method.matched is None else self._time_of(method.matched, item, seed)
        spent = 0.0
        for count, number in enumerate(_seeds(method, seed), 1):
            try:
                solution = self.solver.solve(item.problem, **{**method.changes, "seed": number})
            except UsageError:
                raise
            except SpecguardError as error:
                yield Finished(count, error=error)
                return
            yield Finished(count, solution)
            spent += solution.stats.seconds
            if limit is not None and spent + spent / count / 2 > limit:
                return

    def _time_of(self, name: str, item: Item, seed: int) -> float:
        rows = [row for row in self.journal.rows if row["method"] == name and row["id"] == item.id]
        same = [row for row in rows if row["seed"] == seed] or rows
        return float(same[0]["seconds"])

    def _row(
        self, item: Item, method: Method, seed: int, outcomes: list[Finished], grader: Grader
    ) -> dict[str, Any]:
        solutions = [outcome.solution for outcome in outcomes if outcome.solution is not None]
        errors = [str(outcome.error) for outcome in outcomes if outcome.error is not None]
        started = time.perf_counter()
        answer = self._chosen(item, method, solutions) if solutions else None
        spent = time.perf_counter() - started
        grade = grader.grade(answer, item.answer)
        costs = _costs(solutions)
        if method.has_samples:
            costs["seconds"] += spent
            costs["phase_seconds"]["choose"] = spent
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
            "errors": errors,
            "num_samples": len(outcomes),
            "peak_mebibytes": peak_mebibytes(),
            **costs,
        }

    def _chosen(self, item: Item, method: Method, solutions: list[Solution]) -> str | None:
        if not method.has_samples or method.choice == "majority":
            return vote([solution.boxed_answer for solution in solutions])
        reward = self.solver.pair.reward
        assert reward is not None
        with Runner() as runner:
            ranks = [
                prod(runner.run(_rewards(reward, item.problem, solution))) for solution in solutions
            ]
        return solutions[ranks.index(max(ranks))].boxed_answer


async def _rewards(reward: RewardModel, problem: str, solution: Solution) -> list[float]:
    try:
        texts = [step.text for step in solution.steps]
        return await reward.rewards(solution.text, problem, texts)
    finally:
        reward.release(solution.text)


def _seeds(method: Method, seed: int) -> Iterator[int]:
    """Seeds of a method's samples: no two runs of one method share one."""
    if method.matched is not None:
        return (seed * _MOST_MATCHED + number for number in range(_MOST_MATCHED))
    return (seed * method.num_samples + number for number in range(method.num_samples))


def _timed(outcome: Finished, seconds: float) -> Finished:
    """With the time since the outcome before it: together they are the time of the batch.

    Phases keep their shares: a problem's own ones hold what it waited for others.
    """
    solution = outcome.solution
    if solution is None:
        return outcome
    share = seconds / solution.stats.seconds
    phases = {phase: spent * share for phase, spent in solution.stats.phase_seconds.items()}
    stats = replace(solution.stats, seconds=seconds, phase_seconds=phases)
    return replace(outcome, solution=replace(solution, stats=stats))


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
    """Statistics of one solution, or their sums over several; zeros where there is none."""
    counts = (name for name in Stats.__dataclass_fields__ if name.startswith("num_"))
    columns: dict[str, Any] = {**dict.fromkeys(counts, 0), "seconds": 0.0, "phase_seconds": {}}
    for solution in solutions:
        for name, value in asdict(solution.stats).items():
            if name == "phase_seconds":
                phases = columns[name]
                for phase, seconds in value.items():
                    phases[phase] = phases.get(phase, 0.0) + seconds
            elif name.startswith("num_") or name == "seconds":
                columns[name] += value
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


def _without_cost(config: dict[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in config["settings"].items() if name != "draft_cost"}
    return {**config, "settings": settings}

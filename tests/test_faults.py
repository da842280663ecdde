"""Faults from below: the error of the problem that met them, and the others as if nothing were."""

import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specguard.core import (
    GREEDY,
    Candidate,
    GenerateJob,
    Observation,
    ScoreJob,
    SolveConfig,
    Solver,
    UsageError,
    VerifierConfig,
    solve_many,
)
from specguard.core.records import Solution
from tests.conftest import PROBLEM
from tests.scripted import Scripted

TEXTS = ["the first", "the bad one", "the third"]
BAD = 1
CONFIG = SolveConfig(
    num_candidates=2,
    sampling=GREEDY,
    selector="ngram",
    num_speculated=0,
    verifier=VerifierConfig(weights={"log_prob": 0.5, "grounding": 0.5}),
)
SCRIPT: Any = [["a fact.\n\n", "a fact!\n\n"], "another.\n\n", "So \\boxed{7}.\n\n"]
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="limits are POSIX")

Candidates = Callable[[list[Candidate]], list[Candidate]]
Observations = Callable[[list[Observation]], list[Observation]]


class Faulty(Scripted):
    """An engine that answers the bad problem in a way of its own."""

    spoil: Callable[[str, list[Any]], Any]

    async def generate(self, job: GenerateJob) -> list[Candidate]:
        return await self._answer("generate", job, await super().generate(job))

    async def score(self, job: ScoreJob) -> list[Observation]:
        return await self._answer("score", job, await super().score(job))

    async def _answer(self, verb: str, job: GenerateJob | ScoreJob, answer: list[Any]) -> list[Any]:
        if TEXTS[BAD] not in self.prefix_of(job):
            return answer
        spoilt = self.spoil(verb, answer)
        return await spoilt if asyncio.iscoroutine(spoilt) else spoilt


def pair(spoil: Callable[[str, list[Any]], Any], config: SolveConfig = CONFIG) -> Solver:
    draft, target = Faulty("d", SCRIPT), Faulty("t", SCRIPT)
    draft.spoil = target.spoil = spoil
    return Solver(draft, target, config)


def undisturbed(config: SolveConfig = CONFIG) -> list[Any]:
    made = Solver(Scripted("d", SCRIPT), Scripted("t", SCRIPT), config)
    return [steps_of(made.solve(text)) for text in TEXTS]


def steps_of(solution: Solution | None) -> Any:
    assert solution is not None
    return [(step.text, step.decision, step.scores) for step in solution.steps]


def assert_alone_is_hit(solver: Solver, message: str, **many: Any) -> None:
    outcomes = sorted(solve_many(solver, TEXTS, **many), key=lambda outcome: outcome.index)
    assert message in str(outcomes[BAD].error)
    for index in {0, 1, 2} - {BAD}:
        assert steps_of(outcomes[index].solution) == undisturbed(solver.config)[index]
    for engine in solver.draft, solver.target:
        assert isinstance(engine, Scripted)
        assert not engine.held


def changed(**changes: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda answer: [replace(each, **changes) for each in answer]


WRONG_CANDIDATES: dict[str, tuple[Candidates, str]] = {
    "none": (lambda made: [], "gave 0 candidates where 2"),
    "twice": (lambda made: made * 2, "gave 4 candidates where 2"),
    "no token": (changed(token_ids=(), token_logprobs=np.zeros(0)), "drew 0 tokens"),
    "too many tokens": (
        changed(token_ids=(70,) * 5000, token_logprobs=np.zeros(5000)),
        "drew 5000 tokens",
    ),
    "NaN": (changed(token_logprobs=np.full(9, np.nan)), "gave a log-probability that is none"),
    "a probability": (
        changed(token_logprobs=np.full(9, 0.9)),
        "gave a log-probability that is none",
    ),
    "fewer log-probabilities": (changed(token_logprobs=np.zeros(2)), "gave 2 log-probabilities"),
    "other entropies": (changed(token_entropies=np.zeros(2)), "gave 2 entropies"),
}
WRONG_OBSERVATIONS: dict[str, tuple[Observations, str]] = {
    "none": (lambda seen: [], "gave 0 observations where 1"),
    "twice": (lambda seen: seen * 2, "gave 2 observations where 1"),
    "NaN": (changed(token_logprobs=np.full(9, np.nan)), "gave a log-probability that is none"),
    "other choices": (changed(is_first_choice=np.zeros(3, bool)), "gave 3 first choices"),
    "no attention": (changed(blocks=None), "gave 0 attention blocks where 3"),
    "one layer too few": (
        lambda seen: [replace(each, blocks=(each.blocks or ())[1:]) for each in seen],
        "gave 2 attention blocks where 3",
    ),
    "attention of NaN": (
        lambda seen: [
            replace(
                each,
                blocks=tuple(replace(block, step=block.step * np.nan) for block in each.blocks),
            )
            for each in seen
            if each.blocks
        ],
        "read attention that is not a number",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_CANDIDATES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_candidates_that_are_no_answer_are_refused(wrong: str, batch_size: int) -> None:
    spoil, message = WRONG_CANDIDATES[wrong]
    solver = pair(lambda verb, answer: spoil(answer) if verb == "generate" else answer)
    assert_alone_is_hit(solver, f"the engine d {message}", batch_size=batch_size)


@pytest.mark.parametrize("wrong", WRONG_OBSERVATIONS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_observations_that_are_no_answer_are_refused(wrong: str, batch_size: int) -> None:
    spoil, message = WRONG_OBSERVATIONS[wrong]
    solver = pair(lambda verb, answer: spoil(answer) if verb == "score" else answer)
    assert_alone_is_hit(solver, f"the engine t {message}", batch_size=batch_size)


def test_an_engine_that_falls_silent_costs_its_problem_alone() -> None:
    async def never() -> None:
        await asyncio.get_running_loop().create_future()

    for silent in "generate", "score":
        for batch_size in 1, 3:
            solver = pair(lambda verb, answer, silent=silent: never() if verb == silent else answer)
            message = "no solution within 0.2 s"
            assert_alone_is_hit(solver, message, batch_size=batch_size, time_limit=0.2)


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
def test_a_time_limit_that_is_none_is_refused(limit: float) -> None:
    with pytest.raises(UsageError, match="time_limit must be"):
        solve_many(pair(lambda verb, answer: answer), TEXTS, time_limit=limit)


@given(delays=st.lists(st.integers(0, 7), min_size=1, max_size=12), batch_size=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_answers_may_come_late_and_in_any_order(delays: Sequence[int], batch_size: int) -> None:
    turns = cycle(delays)

    async def late(answer: list[Any]) -> list[Any]:
        for _ in range(next(turns)):
            await asyncio.sleep(0)
        return answer

    solver = pair(lambda verb, answer: late(answer))
    outcomes = sorted(solve_many(solver, TEXTS, batch_size=batch_size), key=lambda done: done.index)
    assert [steps_of(outcome.solution) for outcome in outcomes] == undisturbed()


def test_a_clock_that_jumps_changes_no_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = undisturbed()
    jumps = cycle([0.0, 1e9, -1e9, 4e12])
    now, perf = time.time, time.perf_counter
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    monkeypatch.setattr(time, "perf_counter", lambda: perf() + next(jumps))
    solver = pair(lambda verb, answer: answer)
    for outcome in solve_many(solver, TEXTS, batch_size=2):
        assert outcome.solution is not None
        assert steps_of(outcome.solution) == wanted[outcome.index]
        assert Solution.from_json(outcome.solution.to_json()).text == outcome.solution.text


DISK_COMMANDS: dict[str, tuple[str, ...]] = {
    # One at a time: what shares a pass shows in the last digits of signals.
    "solve": (
        *("--problems", "problems.txt", "--output", "run", "--draft-cost", "0.5"),
        *("--batch-size", "1"),
    ),
    "bench": ("--limit", "6", "--methods", "target,draft", "--output", "run"),
    "calibrate": ("mine", "--limit", "24"),
}


@POSIX
@pytest.mark.slow
@pytest.mark.parametrize("command", DISK_COMMANDS)
def test_a_disk_that_fills_in_mid_run_loses_nothing_that_was_finished(
    command: str, tmp_path: Path
) -> None:
    texts = [PROBLEM.replace("24", str(2 * number)) for number in range(10, 18)]

    def run(name: str, most_bytes: int | None = None) -> tuple[Any, list[Any]]:
        """What became of it in a folder, and the lines of its journal."""

        def limit() -> None:
            if most_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "problems.txt").write_text("\n".join(texts))
        line = [sys.executable, "-m", "specguard.cli", command, *DISK_COMMANDS[command]]
        environment = {**os.environ, "SPECGUARD_CONFIG_DIR": str(folder / "run" / "settings")}
        result = subprocess.run(
            [*line, "--backend", "cpu"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            preexec_fn=limit,
        )
        [journal] = (folder / "run").rglob("*.jsonl")
        whole = journal.read_bytes().split(b"\n")[:-1]
        return result, [json.loads(row) for row in whole]

    undisturbed, wanted = run("undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr
    [journal] = (tmp_path / "undisturbed" / "run").rglob("*.jsonl")
    full, finished = run("disturbed", journal.stat().st_size // 2)
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    assert "File too large" in full.stderr
    assert 1 < len(finished) < len(wanted)
    resumed, rows = run("disturbed")
    assert resumed.returncode == 0, resumed.stderr
    assert rows[: len(finished)] == finished
    assert sorted(map(result_of, rows)) == sorted(map(result_of, wanted))


def result_of(row: dict[str, Any]) -> str:
    """What does not depend on the clock, or on what else a process holds."""
    return json.dumps(
        {
            name: [result_of(step) for step in value] if name == "steps" else value
            for name, value in row.items()
            if "seconds" not in name and name not in ("stats", "peak_mebibytes")
        }
    )

"""Whole solutions: what must come out whatever the engine, and in whatever surroundings."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from specguard.core import (
    GREEDY,
    Engine,
    Sampling,
    Solution,
    SolveConfig,
    Solver,
    Task,
    VerifierConfig,
    ensemble_weights,
    solve_many,
)
from tests.engines import load
from tests.reference import ReferenceEngine

PROBLEM = "Mia has 24 shells."
TEXTS = [PROBLEM, "Some problem.", "Tom has 3 pens and buys 4.", "Another one."]
# Some steps pass, some are written anew: the random models seldom agree.
VERIFIER = VerifierConfig(
    weights=ensemble_weights(0.5), bounds={"log_prob": (-14.0, -5.0)}, threshold=0.82
)
CONFIG = SolveConfig(
    num_candidates=3,
    verifier=VERIFIER,
    delimiter="i",
    max_tokens=40,
    max_step_tokens=9,
    max_steps=8,
)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"method": "sd", "sampling": Sampling(1.0, 0.9)},
    {"selector": "target", "num_candidates": 4},
    {"num_candidates": 5, "num_first_candidates": 2},
    {"rewrite_sampling": Sampling(1.0, 1.0)},
    {"method": "draft", "sampling": Sampling(1.0, 1.0)},
]


Expected = Callable[[dict[str, Any]], list[Any]]


def told(solution: Solution | None) -> list[Any]:
    """What was decided, step by step."""
    assert solution is not None
    steps = [
        (step.text, step.author, step.decision, step.selected, step.num_tokens, step.num_drafted)
        for step in solution.steps
    ]
    return [solution.text, solution.finish_reason, steps]


@pytest.mark.parametrize("verifier", ["draft", "target"])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_target_as_its_own_draft_writes_what_it_writes_alone(
    engine: Engine, verifier: Any, threshold: float
) -> None:
    config = SolveConfig(max_tokens=60, max_step_tokens=9, max_steps=12, selector="ngram")
    solver = Solver(engine, engine, config)
    plain = solver.solve(PROBLEM, method="target")
    judged = VerifierConfig(model=verifier, threshold=threshold)
    ours = solver.solve(PROBLEM, num_candidates=3, sampling=GREEDY, verifier=judged)
    assert ours.text == plain.text
    assert ours.finish_reason == plain.finish_reason
    expected = "accepted" if threshold == 0.0 else "rewritten"
    assert {step.decision for step in ours.steps} == {expected}
    assert ours.stats.num_tokens == plain.stats.num_tokens


def test_greedy_speculation_writes_the_greedy_text(engine: Engine, draft: Engine) -> None:
    solver = Solver(draft, engine, CONFIG)
    expected = solver.solve(PROBLEM, method="target")
    assert told(solver.solve(PROBLEM, method="sd"))[:2] == told(expected)[:2]
    # What it has guessed itself, a model accepts.
    own = Solver(engine, engine, CONFIG).solve(PROBLEM, method="sd")
    assert own.text == expected.text
    assert all(step.num_kept == step.num_guessed for step in own.steps[:-1])


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ", ".join(settings))
def test_solutions_are_those_of_the_reference(
    engine: Engine, draft: Engine, expected: Expected, settings: dict[str, Any]
) -> None:
    """One after the other, and side by side: the same decisions as with plain engines."""
    solver = Solver(draft, engine, CONFIG)
    wanted = expected(settings)
    if solver.configured(**settings).is_stepwise:
        decisions = {step[2] for _, _, steps in wanted for step in steps}
        assert decisions == {"accepted", "rewritten"}
    assert [told(solver.solve(text, **settings)) for text in TEXTS[:2]] == wanted[:2]
    outcomes = solve_many(solver, TEXTS, batch_size=3, **settings)
    found = {outcome.index: told(outcome.solution) for outcome in outcomes}
    assert [found[index] for index in range(len(TEXTS))] == wanted
    for part in engine, draft:
        assert getattr(part, "num_kept", 0) == 0


@pytest.fixture(scope="session")
def expected(checkpoint: Path, draft_checkpoint: Path) -> Expected:
    """What a pair that computes everything anew decides."""
    solver = Solver(
        ReferenceEngine.load(draft_checkpoint), ReferenceEngine.load(checkpoint), CONFIG
    )

    @cache
    def find(number: int) -> list[Any]:
        return [told(solver.solve(text, **SETTINGS[number])) for text in TEXTS]

    return lambda settings: find(SETTINGS.index(settings))


def test_a_seed_decides_the_solution(engine: Engine) -> None:
    solver = Solver(engine, engine, CONFIG)
    accepting = VerifierConfig(threshold=0.0)
    texts = [
        solver.solve(PROBLEM, seed=seed, verifier=accepting, num_candidates=2).text
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    tasks = [Task(PROBLEM, {"seed": seed}) for seed in (1, 0)]
    outcomes = solve_many(solver, tasks, verifier=accepting, num_candidates=2)
    together = {outcome.index: outcome.solution for outcome in outcomes}
    assert [together[0].text, together[1].text] == [texts[2], texts[0]]  # type: ignore[union-attr]


def test_a_running_event_loop_changes_nothing(engine: Engine, draft: Engine) -> None:
    solver = Solver(draft, engine, CONFIG)
    expected = [told(solver.solve(text)) for text in TEXTS]

    async def notebook() -> list[Any]:
        found = [told(solver.solve(TEXTS[0]))]
        solving = [solver.solve_async(text) for text in TEXTS[1:]]
        return found + list(map(told, await asyncio.gather(*solving)))

    assert asyncio.run(notebook()) == expected


def test_several_threads_share_an_engine(engine: Engine, draft: Engine) -> None:
    solver = Solver(draft, engine, CONFIG)
    expected = [told(solver.solve(text)) for text in TEXTS]
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        found = [told(solution) for solution in pool.map(solver.solve, TEXTS)]
    assert found == expected


@pytest.mark.parametrize(
    "names",
    [
        ("torch", "mlx"),
        ("mlx", "torch"),
        ("reference", "torch"),
        ("torch", "llamacpp"),
        ("llamacpp", "torch"),
    ],
)
@pytest.mark.parametrize("settings", SETTINGS[:4], ids=lambda settings: ", ".join(settings))
def test_draft_and_target_may_be_on_different_engines(
    names: tuple[str, str],
    settings: dict[str, Any],
    expected: Expected,
    checkpoint: Path,
    draft_checkpoint: Path,
    cached_load: Callable[[str, Path], Engine],
) -> None:
    draft, target = map(cached_load, names, (draft_checkpoint, checkpoint))
    solver = Solver(draft, target, CONFIG)
    wanted = expected(settings)
    assert [told(solver.solve(text, **settings)) for text in TEXTS[:2]] == wanted[:2]
    for outcome in solve_many(solver, TEXTS, batch_size=4, **settings):
        assert told(outcome.solution) == wanted[outcome.index]


@pytest.fixture(scope="module")
def cached_load() -> Callable[[str, Path], Engine]:
    engines: dict[Any, Engine] = {}

    def find(name: str, folder: Path) -> Engine:
        if (name, folder) not in engines:
            engines[name, folder] = load(name, folder)
        return engines[name, folder]

    return find

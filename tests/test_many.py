"""Many problems at once: the same solutions, errors that stay where they belong, memory bounded."""

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing
from itertools import islice
from typing import Any

import pytest

import specguard
from specguard.core import (
    DraftCost,
    Finished,
    GenerateJob,
    Sampling,
    Solution,
    SolveConfig,
    Solver,
    SpecguardError,
    Task,
    UsageError,
    VerifierConfig,
    solve_many,
    solve_many_async,
)
from specguard.models.tiny import problems
from tests.bigrams import bigram_engine
from tests.scripted import Scripted

# Engines whose steps differ from problem to problem, some accepted and some rewritten.
VARIED = Sampling(2.5, 1.0)
CONFIG = SolveConfig(
    num_candidates=3,
    sampling=VARIED,
    rewrite_sampling=VARIED,
    verifier=VerifierConfig(weights={"log_prob": 1.0}, bounds={"log_prob": (-30.0, 0.0)}),
    delimiter=" ",
    max_step_tokens=9,
    max_tokens=60,
)
TEXTS = [f"problem {number}" for number in range(7)]
ANSWER = "So \\boxed{7}.\n\n"


def solver(**settings: Any) -> Solver:
    made = Solver(bigram_engine(1, 1), bigram_engine(1, 2), CONFIG)
    made.config = made.configured(**settings)
    return made


def in_order(outcomes: Iterator[Finished]) -> list[Finished]:
    return sorted(outcomes, key=lambda outcome: outcome.index)


def decisions(solution: Solution | None) -> list[tuple[str, str, int]]:
    assert solution is not None
    return [(step.decision, step.text, step.num_drafted) for step in solution.steps]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "target"},
        {"method": "sd"},
        {"selector": "target", "rewrite_sampling": Sampling(0.0)},
        {"num_candidates": 6, "num_first_candidates": 2, "sampling": Sampling(0.25, 0.9)},
        {"draft_cost": DraftCost(0.4)},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_a_solution_does_not_depend_on_the_batch(settings: dict[str, Any]) -> None:
    alone = [solver(**settings).solve(text) for text in TEXTS]
    assert len({solution.text for solution in alone}) == len(TEXTS)
    for batch_size in 1, 3, 8:
        together = in_order(solve_many(solver(**settings), TEXTS, batch_size=batch_size))
        assert [outcome.index for outcome in together] == list(range(len(TEXTS)))
        for outcome, expected in zip(together, alone, strict=True):
            assert outcome.solution is not None
            assert decisions(outcome.solution) == decisions(expected)
            assert outcome.solution.finish_reason == expected.finish_reason
            stats = outcome.solution.stats
            assert stats.num_verified_tokens == expected.stats.num_verified_tokens
            assert stats.num_reused_tokens == expected.stats.num_reused_tokens


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_the_built_in_pair_solves_side_by_side_what_it_solves_alone(backend: str) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    pair = specguard.load("tiny", backend=backend, num_candidates=4)
    texts = [problem.text for problem in islice(problems.stream(problems.HELD_OUT), 4)]
    alone = [decisions(pair.solve(text, sampling=Sampling(1.0, 1.0))) for text in texts]
    assert {decision for steps in alone for decision, _, _ in steps} >= {"accepted", "rewritten"}
    outcomes = in_order(solve_many(pair, texts, batch_size=3, sampling=Sampling(1.0, 1.0)))
    assert [decisions(outcome.solution) for outcome in outcomes] == alone


def scripted(*, script: Callable[[GenerateJob], list[str]] | None = None, **changes: Any) -> Solver:
    """A target that solves every problem in two steps."""
    target = Scripted("t", script or ["a fact.\n\n", ANSWER], **changes)
    return Solver(target=target, config=SolveConfig("target"))


def target_of(solver: Solver) -> Scripted:
    assert isinstance(solver.target, Scripted)
    return solver.target


def test_an_outcome_comes_as_soon_as_it_is_there() -> None:
    engine = Scripted("t", [])
    long = [f"{number}.\n\n" for number in range(30)]

    def script(job: GenerateJob) -> list[str]:
        text = engine.prefix_of(job)
        return [ANSWER if "short" in text or long[-1] in text else long[text.count("\n\n")]]

    engine.script = script
    outcomes = solve_many(
        Solver(target=engine), ["long", "short", "short too"], method="target", batch_size=2
    )
    assert [outcome.index for outcome in outcomes] == [1, 2, 0]


def test_side_by_side_means_interleaved() -> None:
    made = scripted()
    list(solve_many(made, TEXTS, batch_size=4))
    assert len({job.key for job in target_of(made).jobs[:4]}) == 4


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_an_error_of_an_engine_stays_with_its_problem(batch_size: int) -> None:
    made = scripted(
        fail_at="generate", fail_on="problem 3\x02a fact", error=SpecguardError("no memory")
    )
    outcomes = in_order(solve_many(made, TEXTS, batch_size=batch_size))
    assert [outcome.index for outcome in outcomes if outcome.error] == [3]
    assert str(outcomes[3].error) == "no memory"
    assert outcomes[3].error is not None
    assert outcomes[3].error.__traceback__ is None  # which would keep alive what was in hand
    assert {outcome.solution.answer for outcome in outcomes if outcome.solution} == {"7"}
    assert not target_of(made).held


def test_a_bad_problem_or_setting_is_the_outcome_of_its_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    bad = [
        Task("p", {"seed": -1}),
        Task("p", {"no_such": 1}),
        Task("p", {"selector": "sentence-transformers:any"}),
        Task("p", {"method": "rsd"}),
        " ",
        "x" * 600,
    ]
    messages = [
        "seed must lie",
        "no setting is called 'no_such'",
        "sentence-transformers is not installed",
        "needs a reward model",
        "problem is empty",
        "context window",
    ]
    for budget in None, 10**9:
        outcomes = in_order(
            solve_many(solver(), [TEXTS[0], *bad, TEXTS[1]], batch_size=3, memory_budget=budget)
        )
        assert [outcome.index for outcome in outcomes] == list(range(8))
        for outcome, message in zip(outcomes[1:-1], messages, strict=True):
            assert message in str(outcome.error)
        for outcome, text in (outcomes[0], TEXTS[0]), (outcomes[-1], TEXTS[1]):
            assert decisions(outcome.solution) == decisions(solver().solve(text))


def test_what_no_engine_foresaw_ends_all_and_lets_go() -> None:
    made = scripted(fail_at="generate", fail_on="problem 2", error=RuntimeError("a defect"))
    with pytest.raises(RuntimeError, match="a defect"):
        list(solve_many(made, TEXTS, batch_size=4))
    assert not target_of(made).held


def test_problems_that_cannot_be_read_end_all_and_let_go() -> None:
    def texts() -> Iterator[str]:
        yield from TEXTS[:3]
        raise OSError("the file is gone")

    made = scripted()
    outcomes = solve_many(made, texts(), batch_size=2)
    assert next(outcomes).solution is not None
    with pytest.raises(OSError, match="the file is gone"):
        list(outcomes)
    assert not target_of(made).held
    assert list(outcomes) == []


def test_settings_may_differ_from_problem_to_problem() -> None:
    tasks = [Task(TEXTS[0], {"seed": seed}) for seed in range(3)]
    outcomes = in_order(solve_many(solver(), tasks, batch_size=3, seed=9))
    texts = [outcome.solution.text for outcome in outcomes if outcome.solution is not None]
    assert texts == [solver(seed=seed).solve(TEXTS[0]).text for seed in range(3)]
    assert len(set(texts)) > 1


def test_problems_are_read_as_room_becomes_free() -> None:
    read = []

    def endless() -> Iterator[str]:
        for number in range(10**6):
            read.append(number)
            yield f"problem {number}"

    outcomes = solve_many(scripted(), endless(), batch_size=2)
    assert read == []
    assert len(list(islice(outcomes, 3))) == 3
    assert len(read) <= 3 + 2 + 1  # those that are under way, and the next one
    outcomes.close()


def test_closing_cancels_all_and_lets_go_at_once() -> None:
    made = scripted()
    outcomes = solve_many(made, [*TEXTS[:1], *(f"{text} again" for text in TEXTS)], batch_size=4)
    target_of(made).script = lambda job: [
        ANSWER if "again" not in target_of(made).prefix_of(job) else f"{len(job.prefix)}.\n\n"
    ]
    assert next(outcomes).index == 0
    assert len(target_of(made).held) == 3
    num_jobs = len(target_of(made).jobs)
    outcomes.close()
    assert not target_of(made).held
    assert list(outcomes) == []
    assert len(target_of(made).jobs) <= num_jobs + 3  # each had its turn once more, at most


def test_closing_in_an_event_loop_lets_go_at_once() -> None:
    made = scripted()

    async def first() -> int:
        async with aclosing(solve_many_async(made, TEXTS, batch_size=4)) as outcomes:
            index = (await anext(outcomes)).index
        assert not target_of(made).held
        return index

    assert asyncio.run(first()) == 0


def test_a_budget_bounds_how_many_are_under_way() -> None:
    sizes = []

    def script(job: GenerateJob) -> list[str]:
        sizes.append(len(target_of(made).held))
        return [ANSWER]

    made = scripted(script=script, num_bytes_per_token=10, num_turns=3)
    # A prompt of eleven tokens and 89 more, thrice: a buffer doubles when it is full.
    problem = 3 * 100 * 10
    for budget, most in (2 * problem, 2), (3 * problem - 1, 2), (3 * problem, 3), (None, 7):
        sizes.clear()
        outcomes = in_order(
            solve_many(made, TEXTS, batch_size=7, memory_budget=budget, max_tokens=89)
        )
        assert [outcome.solution is not None for outcome in outcomes] == [True] * len(TEXTS)
        assert max(sizes) == most
    # One that never fits is refused, and the others go on; what takes no memory always fits.
    tasks = [TEXTS[0], Task(TEXTS[1], {"max_tokens": 90}), TEXTS[2]]
    outcomes = in_order(solve_many(made, tasks, memory_budget=problem, max_tokens=89))
    assert "may take 3030 bytes of keys and values, and the budget is 3000" in str(
        outcomes[1].error
    )
    assert [outcome.solution is not None for outcome in outcomes] == [True, False, True]
    elsewhere = scripted(num_bytes_per_token=0)
    [outcome] = solve_many(elsewhere, TEXTS[:1], memory_budget=0)
    assert outcome.solution is not None


def test_candidates_take_room_too() -> None:
    engines = [Scripted(name, [ANSWER], num_bytes_per_token=10) for name in "dt"]
    config = SolveConfig(num_candidates=4, max_step_tokens=20, max_tokens=89)
    made = Solver(*engines, config)
    needed = 2 * 3 * (100 + 4 * 20) * 10
    for budget, fits in (needed, True), (needed - 1, False):
        [outcome] = solve_many(made, TEXTS[:1], memory_budget=budget)
        assert (outcome.solution is not None) == fits


def test_impossible_batches_and_settings_are_refused_at_once() -> None:
    with pytest.raises(UsageError, match="batch_size"):
        solve_many(solver(), TEXTS, batch_size=0)
    with pytest.raises(UsageError, match="seed"):
        solve_many(solver(), TEXTS, seed=-1)
    with pytest.raises(UsageError, match="a list of texts, not one"):
        solve_many(solver(), "abc")
    assert list(solve_many(solver(), [])) == []

"""Arguments of the wrong type are refused as such, whatever else is wrong with them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from specguard import Sampling, SolveConfig, Solver, UsageError, VerifierConfig, solve_many
from tests.bigrams import bigram_engine

WRONG: list[tuple[Callable[..., Any], str]] = [
    (lambda: SolveConfig(num_candidates="3"), "num_candidates must be of type int, not '3'"),
    (lambda: SolveConfig(num_candidates=10**20), "at most 4096"),
    (lambda: SolveConfig(num_speculated=10**6), "at most 4096"),
    (lambda: SolveConfig(max_tokens=2.5), "max_tokens must be of type int or None"),
    (lambda: SolveConfig(sampling=0.7), "sampling must be of type Sampling or None"),
    (lambda: SolveConfig(verifier="draft"), "verifier must be of type VerifierConfig"),
    (lambda: SolveConfig(seed=None), "seed must be of type int"),
    (lambda: SolveConfig(method=3), "no method is called 3"),
    (lambda: VerifierConfig(threshold="0.7"), "threshold must be of type float"),
    (lambda: VerifierConfig(weights=1), "weights must be of type Mapping"),
    (lambda: Sampling(temperature="hot"), "temperature must be of type float"),
    (lambda: solve_many("abc", ["a problem"]), "a solver is needed, not str"),
    (lambda: solve_many(Solver(), "abc"), "problems are a list of texts, not one"),
    (lambda: solve_many(Solver(), 5), "problems are a list of texts, not int"),
    (lambda: solve_many(Solver(), [], batch_size="8"), "batch_size must be at least 1, not '8'"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_wrong_types_are_usage_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert message in caught.value.message


def test_numbers_of_numpy_are_numbers() -> None:
    config = SolveConfig(num_candidates=np.int64(3), reward_threshold=1)
    assert (config.num_candidates, config.reward_threshold) == (3, 1)


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (5, "a problem is a text, not 5"),
        (None, "is a text"),
        ("a \ud800", "no valid Unicode"),
        (" ", "empty"),
    ],
)
def test_what_is_no_problem_is_refused_by_itself(problem: Any, message: str) -> None:
    solver = Solver(bigram_engine(1, 1), bigram_engine(1, 2), SolveConfig(max_tokens=3))
    with pytest.raises(UsageError) as caught:
        solver.solve(problem)
    assert message in caught.value.message
    for budget in None, 10**9:  # and leaves the others alone
        first, second = sorted(
            solve_many(solver, [problem, "another one"], memory_budget=budget),
            key=lambda outcome: outcome.index,
        )
        assert message in str(first.error)
        assert second.solution is not None

"""A grid of verifiers says what it means, and costs add up."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.real_pair.frontier import Verifier, cost, grid, table
from specguard.core import Observation
from specguard.core.verifier import verify

LOGPROBS = st.lists(st.floats(-9, 0), min_size=1, max_size=12)


@given(LOGPROBS, st.sampled_from([-5.0, -9.0, -18.0]), st.sampled_from([0.0, 3.0]))
def test_a_step_passes_from_the_named_sum_on(
    logprobs: list[float], least: float, by_numbers: float
) -> None:
    pieces = ["7" if place % 3 == 0 else "a" for place in range(len(logprobs))]
    seen = Observation(np.array(logprobs), np.zeros(len(logprobs), dtype=np.bool_))
    value = sum(logprobs) + by_numbers * min(logprobs[::3])
    if abs(value - least) < 1e-6:
        return
    verdict = verify(seen, None, 0.0, pieces, Verifier(least, by_numbers).config)
    assert verdict.is_accepted == (value > least)


def test_methods_are_read_from_their_names() -> None:
    methods = {method.name: method for method in grid("target,draft,-9,-18/2.5")}
    assert list(methods) == [
        "target",
        "draft",
        "sum>=-9",
        "sum+2.5num>=-18",
    ]


def test_costs_are_in_the_target_s_tokens() -> None:
    counts = {
        "num_target_tokens": 5,
        "num_drafted_tokens": 100,
        "num_verified_steps": 4,
        "num_verified_tokens": 80,
        "num_tokens": 100,
        "num_accepted_steps": 3,
    }
    figures = (0.4, 1.0, 0.05)
    assert cost(counts, figures) == pytest.approx(5 + 40 + 4 + 4)
    alone = {**counts, "num_target_tokens": 100, "num_verified_steps": 0}
    rows = [
        {"method": "target", "id": "1", "is_right": True, **alone},
        {"method": "own", "id": "1", "is_right": False, **counts},
        {"method": "own", "id": "2", "is_right": True, **counts},  # the target has not come to it
    ]
    shown = table(rows, figures)
    assert "1 problems" in shown
    assert "| own | 0.0% | 1.00 | 0.53 | 75% |" in shown

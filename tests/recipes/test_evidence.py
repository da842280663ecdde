"""The measurements on the built-in pair: estimates, and each command from end to end."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from recipes.evidence.__main__ import main
from recipes.evidence.selection import table
from recipes.evidence.signals import auc


@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=30),
)
def test_auc_counts_pairs(steps: list[tuple[int, bool]]) -> None:
    right = [value for value, is_right in steps if is_right]
    wrong = [value for value, is_right in steps if not is_right]
    found = auc(np.array([float(value) for value, _ in steps]), np.array([r for _, r in steps]))
    if not right or not wrong:
        assert np.isnan(found)
        return
    wins = sum((a > b) + (a == b) / 2 for a, b in product(right, wrong))
    assert found == pytest.approx(wins / len(right) / len(wrong))


def row(errors: list[str | None], **signals: list[float]) -> dict[str, Any]:
    names = {"draft log_prob": 0.0, "draft log_prob_mean": 0.0}
    names |= {"target log_prob": 0.0, "target log_prob_mean": 0.0}
    candidates = [
        {"error": error, "signals": {**names, **{n: v[i] for n, v in signals.items()}}}
        for i, error in enumerate(errors)
    ]
    similarities = {"draft": {"4": [0.1, 0.9, 0.9, 0.2]}}
    return {
        "problem": 0,
        "samples": [0, 1, 2, 2],
        "candidates": candidates,
        "similarities": similarities,
    }


def test_selectors_take_what_they_say() -> None:
    target = {"target log_prob": [-0.1, -3.0, -2.0], "draft log_prob": [-5.0, -1.0, -2.0]}
    shares = {name: share for name, _, share, _, _ in table([row([None, "x", "y"], **target)], [4])}
    assert shares["a random candidate"] == 0.25
    assert shares["best possible"] == 1.0
    assert shares["medoid, draft"] == 0.0
    assert shares["the target: highest log-prob (min)"] == 1.0
    assert shares["highest draft log-prob (min)"] == 0.0


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_steps_are_collected_and_tabulated(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    invoke("collect", "--count", 1, "--output", file, "--embedder", "numbers")
    before = file.read_bytes()
    invoke("collect", "--count", 1, "--output", file, "--embedder", "numbers")
    assert file.read_bytes() == before
    first = json.loads(before.splitlines()[1])["steps"][0]
    assert len(first["samples"]) == 16
    assert max(first["samples"]) == len(first["candidates"]) - 1
    assert [len(s) for s in first["similarities"]["numbers"].values()] == [4, 8, 16]
    output = invoke("signals", file, "--embedder", "numbers", "--match", "log_prob")
    assert "| target log_prob |" in output
    assert "medoid, numbers" in invoke("selectors", file)


def test_settings_are_compared_problem_by_problem(tmp_path: Path) -> None:
    options = ("--count", 1, "--output", tmp_path / "run", "--table", "layers")
    output = invoke("sensitivity", *options)
    assert "| target | 1 |" in output
    assert "| last 2 layers, epsilon 0.01 | 1 |" in output
    assert invoke("sensitivity", *options) == output

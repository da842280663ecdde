"""Shortcuts change the time of a solution and nothing else, and one switch turns them off."""

from itertools import islice
from typing import Any

import numpy as np
import pytest

import specguard
from specguard.core import Solution, UsageError, VerifierConfig, solve_many
from specguard.core.reference import VARIABLE
from specguard.models.tiny import problems

TEXTS = [problem.text for problem in islice(problems.stream(problems.HELD_OUT), 3)]
DRAFT_VERIFIES = VerifierConfig(model="draft", weights={"log_prob": 1.0}, threshold=0.9)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"method": "target"},
    {"method": "sd"},
    {"num_candidates": 4, "selector": "target"},
    {"num_candidates": 4, "num_first_candidates": 2, "selector": "draft"},
    {"num_candidates": 3, "selector": "numbers", "verifier": DRAFT_VERIFIES},
]


def solved(backend: str, **settings: Any) -> list[Solution]:
    # What a rewrite costs decides where drafting pays: without the fallback for once.
    solver = specguard.load("tiny", backend=backend, draft_cost=None, **settings)
    finished = solve_many(solver, TEXTS, batch_size=2, detail=True)
    solutions = {outcome.index: outcome.solution for outcome in finished}
    return [solutions[index] for index in range(len(TEXTS))]  # type: ignore[misc]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(settings))
@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_without_shortcuts_solutions_are_the_same(
    backend: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    usual = solved(backend, **settings)
    monkeypatch.setenv(VARIABLE, "1")
    for found, expected in zip(solved(backend, **settings), usual, strict=True):
        assert_equal(found, expected)


def assert_equal(found: Solution, expected: Solution) -> None:
    assert found.text == expected.text
    assert found.finish_reason == expected.finish_reason
    for step, wanted in zip(found.steps, expected.steps, strict=True):
        assert (step.author, step.decision, step.selected) == (
            wanted.author,
            wanted.decision,
            wanted.selected,
        )
        assert step.signals == pytest.approx(wanted.signals, abs=1e-4)
        assert [one.token_ids for one in step.candidates or ()] == [
            one.token_ids for one in wanted.candidates or ()
        ]


def test_the_switch_turns_fused_layers_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not specguard.load("tiny", backend="cpu").notes
    monkeypatch.setenv(VARIABLE, "1")
    [note] = specguard.load("tiny", backend="cpu").notes
    assert "the reference switch is on" in note


def test_the_switch_keeps_candidates_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def num_forwarded() -> int:
        solver = specguard.load("tiny", backend="cpu")
        layer = solver.draft.layer  # type: ignore[union-attr]
        forwarded: list[int] = []
        forward = layer.forward
        layer.forward = lambda rows, *rest: forwarded.append(len(rest[1])) or forward(rows, *rest)
        solver.solve(TEXTS[0], num_candidates=4)
        return sum(forwarded)

    merged = num_forwarded()
    monkeypatch.setenv(VARIABLE, "1")
    assert merged < 0.9 * num_forwarded()


def test_the_switch_has_tokens_drawn_that_top_p_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from specguard.backends.pytorch import sampling

    calls: list[Any] = []
    draw = sampling.draw
    monkeypatch.setattr(sampling, "draw", lambda *rest: calls.append(rest) or draw(*rest))
    peaked = torch.tensor([[0.0, 50.0]])
    uniforms = np.array([0.5], dtype=np.float32)
    sampling.sample(peaked, specguard.Sampling(0.7, 0.8), uniforms)
    assert not calls
    monkeypatch.setenv(VARIABLE, "1")
    assert sampling.sample(peaked, specguard.Sampling(0.7, 0.8), uniforms).tolist() == [1]
    assert len(calls) == 1


def test_the_switch_turns_compiling_off(monkeypatch: pytest.MonkeyPatch) -> None:
    mlx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    from specguard.backends.mlx import sampling

    # What is traced sees the arrays of another call; without compiling, those of this one.
    seen: list[Any] = []
    work = sampling._compiled(lambda array: seen.append(array) or array + 1)  # type: ignore[func-returns-value]
    first = mlx.array([1.0])
    work(first)
    work(first)
    assert len(seen) == 1
    monkeypatch.setenv(VARIABLE, "1")
    work(first)
    work(first)
    assert len(seen) == 3


def test_the_switch_rewrites_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    solver = specguard.load("tiny", backend="cpu", draft_cost=None)
    assert any(solver.solve(text).stats.num_reused_tokens for text in TEXTS)
    monkeypatch.setenv(VARIABLE, "1")
    assert not any(solver.solve(text).stats.num_reused_tokens for text in TEXTS)


def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "all")
    with pytest.raises(UsageError, match="0 or 1"):
        specguard.load("tiny", backend="cpu")

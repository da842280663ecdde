"""Shortcuts change the time of a solution and nothing else, and each has a switch."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest

import specguard
from specguard.core import Solution, UsageError, VerifierConfig, solve_many
from specguard.core.shortcuts import SHORTCUTS, VARIABLE, uses
from specguard.models.tiny import problems

TEXTS = [problem.text for problem in islice(problems.stream(problems.HELD_OUT), 3)]
DRAFT_VERIFIES = VerifierConfig(model="draft", weights={"log_prob": 1.0}, threshold=0.9)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"method": "target"},
    {"method": "sd"},
    {"num_candidates": 4, "selector": "target"},
    {"num_candidates": 4, "num_first_candidates": 2, "selector": "draft"},
    {
        "num_candidates": 3,
        "selector": "numbers",
        "verifier": DRAFT_VERIFIES,
        "rewrite": "speculate",
    },
]


def solved(backend: str, **settings: Any) -> list[Solution]:
    # What a rewrite costs decides where drafting pays: without the fallback for once.
    pair = specguard.load("tiny", backend=backend, draft_cost=None, **settings)
    found = {one.index: one.solution for one in solve_many(pair, TEXTS, batch_size=2, detail=True)}
    return [found[index] for index in range(len(TEXTS))]  # type: ignore[misc]


def assert_equal(found: list[Solution], wanted: list[Solution]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.text == other.text
        assert one.finish_reason == other.finish_reason
        for step, expected in zip(one.steps, other.steps, strict=True):
            assert (step.author, step.decision, step.selected) == (
                expected.author,
                expected.decision,
                expected.selected,
            )
            assert step.signals == pytest.approx(expected.signals, abs=1e-4)
            assert (step.candidates is None) == (expected.candidates is None)
            for candidate, drawn in zip(
                step.candidates or (), expected.candidates or (), strict=True
            ):
                assert candidate.text == drawn.text


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(settings))
@pytest.mark.parametrize("backend", ["cpu", "mlx"])
def test_without_any_shortcut_solutions_are_the_same(
    backend: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    usual = solved(backend, **settings)
    monkeypatch.setenv(VARIABLE, "all")
    assert_equal(solved(backend, **settings), usual)


def _is_lean(pair: Any) -> bool:
    return pair.draft._forward._lean is not None


def _forwards_less(pair: Any) -> bool:
    from specguard.backends.pytorch.forward import Forward

    forwarded = []
    run = Forward.run

    def counted(self: Any, layout: Any, tokens: Any, *rest: Any, **named: Any) -> Any:
        if self is pair.draft._forward:
            forwarded.append(sum(map(len, tokens)))
        return run(self, layout, tokens, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Forward, "run", counted)
        solution = pair.solve(TEXTS[0], num_candidates=4)
    return sum(forwarded) < 0.9 * solution.stats.num_drafted_tokens


def _draws_nothing(pair: Any) -> bool:
    import torch

    from specguard.backends.pytorch import sampling

    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "draw", lambda *args: calls.append(args) or torch.tensor([1]))
        peaked = torch.tensor([[0.0, 50.0]])
        sampling.sample(peaked, specguard.core.Sampling(0.7, 0.8), np.array([0.5]))
    return not calls


def _compiles(pair: Any) -> bool:
    mlx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    from specguard.backends.mlx import sampling

    # What is traced sees the arrays of another call; without compiling, those of this one.
    seen = []
    chosen = sampling._compiled(lambda array: seen.append(array) or array + 1)  # type: ignore[func-returns-value]
    first = mlx.array([1.0])
    chosen(first)
    chosen(first)
    return len(seen) == 1


def _keeps_a_beginning(pair: Any) -> bool:
    return any(pair.solve(text).stats.num_reused_tokens for text in TEXTS)


def _joins(pair: Any) -> bool:
    from specguard.backends.pytorch.drafting import TorchDrafting

    wanted = []
    run = TorchDrafting.run

    def counted(self: Any, num_wanted: int) -> Any:
        wanted.append(num_wanted < len(self._rows) + len(self._joining))
        return run(self, num_wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchDrafting, "run", counted)
        list(solve_many(pair, TEXTS, batch_size=3))
    return any(wanted)


TELLS: dict[str, Callable[[Any], bool]] = {
    "lean": _is_lean,
    "tree": _forwards_less,
    "only-choice": _draws_nothing,
    "compiled": _compiles,
    "beginning": _keeps_a_beginning,
    "joining": _joins,
}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_each_shortcut_has_a_switch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TELLS[name](specguard.load("tiny", backend="cpu"))
    backend = "mlx" if name == "compiled" else "cpu"
    usual = solved(backend, num_candidates=3)
    monkeypatch.setenv(VARIABLE, f"{name},")
    assert not TELLS[name](specguard.load("tiny", backend="cpu"))
    assert_equal(solved(backend, num_candidates=3), usual)


def test_what_is_no_shortcut_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "lean,trees")
    with pytest.raises(UsageError, match="trees"):
        specguard.load("tiny", backend="cpu")
    monkeypatch.setenv(VARIABLE, "all, lean")
    assert not any(map(uses, SHORTCUTS))

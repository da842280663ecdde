"""What a run of the benchmark is known again by, and what is found before it begins."""

from collections.abc import Sequence
from dataclasses import field, make_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from specguard.bench.datasets import DataSet, Item
from specguard.bench.methods import choose_methods
from specguard.bench.runner import FILE_NAME, Run
from specguard.core import (
    DraftCost,
    Sampling,
    SolveConfig,
    Solver,
    SpecguardError,
    UsageError,
    VerifierConfig,
    config,
)
from specguard.core.config import changed_settings
from specguard.journal import read_lines
from tests.reference import ReferenceEngine

BASE = SolveConfig(num_candidates=2, delimiter=" ", max_step_tokens=9, max_tokens=20)
DATA = DataSet("two", tuple(Item(f"{n}", f"problem {n}", "1") for n in range(2)))
METHODS = ("target", "paper@2", "majority-draft@2")
# As they are after a release that brought one setting more.
NewVerifier = make_dataclass(
    "NewVerifier", [("patience", int, field(default=3))], bases=(VerifierConfig,), frozen=True
)
NewConfig = make_dataclass(
    "NewConfig",
    [("courage", float, field(default=0.5)), ("verifier", Any, field(default_factory=NewVerifier))],
    bases=(SolveConfig,),
    frozen=True,
)


def new(old: SolveConfig, **changes: Any) -> Any:
    """The same settings in the later release."""
    values = {name: getattr(old, name) for name in SolveConfig.__dataclass_fields__}
    verifier = {name: getattr(old.verifier, name) for name in VerifierConfig.__dataclass_fields__}
    return NewConfig(**{**values, "verifier": NewVerifier(**verifier), **changes})


def run(folder: Path, settings: SolveConfig, names: Sequence[str] = METHODS) -> tuple[int, int]:
    """How many solutions were missing, and how many rows there are in the end."""
    solver = Solver(ReferenceEngine(1), ReferenceEngine(2), settings)
    made = Run(solver, DATA, choose_methods(tuple(names), settings), (0,), folder, "cpu")
    try:
        num_missing = made.num_missing
        assert len(list(made.rows_to_come())) == num_missing
        return num_missing, len(made.rows)
    finally:
        made.close()


def test_a_run_of_before_a_new_setting_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, BASE) == (6, 6)
    monkeypatch.setattr(config, "SolveConfig", NewConfig)
    monkeypatch.setattr(config, "VerifierConfig", NewVerifier)
    assert run(tmp_path, new(BASE)) == (0, 6)
    for changes in {"courage": 0.6}, {"verifier": NewVerifier(patience=4)}:
        with pytest.raises(SpecguardError, match="was run with other settings here"):
            run(tmp_path, new(BASE, **changes))
    assert run(tmp_path / "new", new(BASE, courage=0.6)) == (6, 6)
    assert run(tmp_path / "new", new(BASE, courage=0.6)) == (0, 6)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_speculated": 5},
        {"max_tokens": 21},
        {"sampling": Sampling(0.7, 0.9)},
        {"verifier": VerifierConfig(threshold=0.5)},
        {"verifier": VerifierConfig(bounds={"log_prob": (-3.0, 0.0)})},
        {"system_prompt": "Think."},
    ],
)
def test_other_settings_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    other = replace(BASE, **changes)
    names = ("specguard", "majority-draft@2")
    run(tmp_path, BASE, names)
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(SpecguardError, match=r"method '.*' was run with other settings here"):
        run(tmp_path, other, names)
    assert (tmp_path / FILE_NAME).read_bytes() == before
    assert run(tmp_path, BASE, names) == (0, 4)


def test_a_run_goes_on_where_drafting_costs_something_else_now(tmp_path: Path) -> None:
    names = ("specguard", "sd", "paper")
    cheap, dear = (
        replace(BASE, draft_cost=DraftCost(cost, verification=1.0)) for cost in (0.1, 0.9)
    )
    assert run(tmp_path, cheap, names) == (6, 6)
    assert run(tmp_path, dear, names) == (0, 6)
    costs = {
        row["method"]: row["config"]["settings"].get("draft_cost", {}).get("candidate")
        for row in read_lines(tmp_path / FILE_NAME)[1:]
    }
    # As `solve` runs them, and the others with every step drafted whatever it costs.
    assert costs == {"specguard": 0.1, "sd": 0.1, "paper": None}


def test_rows_hold_what_differs_from_the_defaults_and_a_version(tmp_path: Path) -> None:
    run(tmp_path, BASE, ("target",))
    for row in read_lines(tmp_path / FILE_NAME)[1:]:
        assert row["config"]["version"] == 2
        assert row["config"]["settings"] == {
            "delimiter": " ",
            "max_step_tokens": 9,
            "max_tokens": 20,
            "method": "target",
            "num_candidates": 2,
            "sampling": {"temperature": 0.0, "top_p": 1.0},
        }


def test_changed_settings_are_plain_and_of_one_form() -> None:
    assert changed_settings(SolveConfig()) == {}
    verifier = VerifierConfig(weights={"log_prob": 1.0}, bounds={"log_prob": (-2, 0)})
    settings = SolveConfig(verifier=verifier, draft_cost=DraftCost(0.5), seed=7)
    changes = changed_settings(settings)
    assert changes["verifier"] == {"bounds": {"log_prob": [-2, 0]}, "weights": {"log_prob": 1.0}}
    assert changes["draft_cost"]["candidate"] == 0.5
    assert changes["seed"] == 7
    turned = VerifierConfig(weights={"grounding": 0.4, "log_prob": 0.6})
    same = VerifierConfig(weights={"log_prob": 0.6, "grounding": 0.4})
    assert str(changed_settings(SolveConfig(verifier=turned))) == (
        str(changed_settings(SolveConfig(verifier=same)))
    )


def test_a_method_that_an_engine_cannot_run_is_refused_before_the_first_problem(
    tmp_path: Path,
) -> None:
    lacking = ReferenceEngine(2, reasons={"attention": "it slides", "choices": "none"})
    solver = Solver(ReferenceEngine(1), lacking, replace(BASE, selector="ngram"))
    for name, lack in ("paper@2", "attention (it slides)"), ("sd", "choices"):
        methods = choose_methods(("target", name), solver.config)
        with pytest.raises(SpecguardError, match=f"method '{name}' cannot be run") as caught:
            Run(solver, DATA, methods, (0,), tmp_path, "cpu")
        assert lack in caught.value.message
    methods = choose_methods(("draft",), BASE)
    with pytest.raises(UsageError, match="needs a draft model"):
        Run(Solver(None, lacking, BASE), DATA, methods, (0,), tmp_path, "cpu")
    assert not (tmp_path / FILE_NAME).exists()

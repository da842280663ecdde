"""Calibration: what a fit finds in labelled steps, and profiles that know their pair."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import specguard
from specguard.bench.datasets import load_dataset
from specguard.bench.grading import Grader
from specguard.calibration.fit import Kind, fit, reliability_plot
from specguard.calibration.labels import label_steps
from specguard.cli.main import main
from specguard.core import SpecguardError, UsageError, VerifierConfig
from specguard.core.config import SIGNALS
from specguard.core.verifier import normalise
from specguard.models.profiles import Profile, find_profile, fingerprint, save_profile
from tests.conftest import TINY

PROBLEM = "Mia has 24 shells. Mia finds 9 more shells. How many shells does Mia have?"


def noise(seed: int) -> list[dict[str, Any]]:
    """80 steps of 40 problems, none of whose signals tells anything."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(80) % 2 == 0).tolist()
    return [
        {"problem": str(number // 2), "is_right": is_right, "signals": signals}
        for number, is_right in enumerate(labels)
        for signals in [{name: float(rng.normal()) for name in SIGNALS}]
    ]


def steps(informative: str, count: int = 400) -> list[dict[str, Any]]:
    """Labelled steps of which one signal tells right from wrong and the others are noise."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        is_right = bool(rng.random() < 0.7)
        signals = {"log_prob": -rng.random(), "grounding": rng.random()}
        signals |= {"entropy_max": rng.random(), "consistency": rng.random()}
        shift = 0.6 if is_right else 0.0
        direction = -1 if informative == "entropy_max" else 1
        signals[informative] = signals[informative] * 0.6 + direction * shift
        rows.append({"problem": str(number // 5), "is_right": is_right, "signals": signals})
    return rows


@pytest.mark.parametrize(("informative", "beta"), [("log_prob", 1.0), ("grounding", 0.0)])
def test_beta_goes_to_the_signal_that_tells(informative: str, beta: float) -> None:
    fitted = fit(steps(informative), VerifierConfig(), "beta", 0.05)
    assert abs(fitted.verifier.weights.get("log_prob", 0.0) - beta) <= 0.2
    assert fitted.auc > 0.8
    assert fitted.verifier.is_calibrated


@pytest.mark.parametrize("has_grounding", [False, True])
def test_two_reductions_go_together_where_each_tells_something(has_grounding: bool) -> None:
    rows = steps("consistency")
    rng = np.random.default_rng(1)
    for row in rows:
        signals = row["signals"]
        if not has_grounding:
            del signals["grounding"]
        for name in "log_prob_sum", "log_prob_numbers":  # each half of what there is to know
            signals[name] = -abs(rng.normal(0.5 if row["is_right"] else 1.5))
    alone = [{**row, "signals": {**row["signals"], "log_prob_numbers": 0.0}} for row in rows]
    found, one = (fit(each, VerifierConfig(), "beta", 0.05) for each in (rows, alone))
    assert found.verifier.weights["log_prob_sum"] == pytest.approx(0.5, abs=0.2)
    assert found.verifier.weights["log_prob_numbers"] == pytest.approx(0.5, abs=0.2)
    assert sum(found.verifier.weights.values()) == pytest.approx(1.0)
    assert found.auc > one.auc
    assert found.right_accepted > one.right_accepted


def test_a_logistic_fit_weighs_every_signal_that_helps() -> None:
    fitted = fit(steps("entropy_max"), VerifierConfig(), "logistic", 0.05)
    weights = fitted.verifier.weights
    assert max(weights, key=weights.__getitem__) == "entropy_max"
    assert sum(weights.values()) == pytest.approx(1.0)
    assert all(weight > 0 for weight in weights.values())
    low, high = fitted.verifier.bounds["entropy_max"]
    assert low > high  # much entropy scores 0
    assert fitted.auc > fit(steps("entropy_max"), VerifierConfig(), "beta", 0.05).auc + 0.2
    assert reliability_plot(fitted).startswith(b"\x89PNG")


@pytest.mark.parametrize("accept_wrong", [0.0, 0.05, 0.3, 1.0])
def test_the_threshold_keeps_to_the_trade_off(accept_wrong: float) -> None:
    rows = steps("log_prob")
    fitted = fit(rows, VerifierConfig(), "beta", accept_wrong)
    verifier = fitted.verifier
    scores = [
        sum(
            weight * normalise(name, row["signals"][name], verifier)
            for name, weight in verifier.weights.items()
        )
        for row in rows
    ]
    passes = np.round(scores, 12) >= verifier.threshold
    is_right = np.array([row["is_right"] for row in rows])
    assert passes[~is_right].mean() <= accept_wrong
    # On steps that it has not seen it does about as well: there is one signal to fit.
    assert fitted.wrong_accepted == pytest.approx(passes[~is_right].mean(), abs=0.05)
    assert fitted.right_accepted == pytest.approx(passes[is_right].mean(), abs=0.05)
    if accept_wrong == 1.0:
        assert fitted.right_accepted == 1.0


def test_too_few_steps_are_not_fitted() -> None:
    with pytest.raises(SpecguardError, match="too few"):
        fit(steps("log_prob", 12), VerifierConfig(), "beta", 0.05)


@pytest.mark.parametrize("kind", ["beta", "logistic"])
def test_noise_looks_like_noise(kind: Kind) -> None:
    """What is fitted to all steps, a sign or a threshold, would tell the same ones apart."""
    fits = [fit(noise(seed), VerifierConfig(), kind, 0.2) for seed in range(20)]
    assert np.mean([fitted.auc for fitted in fits]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([fitted.brier for fitted in fits]) > 0.245
    gaps = [fitted.right_accepted - fitted.wrong_accepted for fitted in fits]
    assert np.mean(gaps) == pytest.approx(0.0, abs=0.05)


def test_steps_of_one_problem_are_not_fitted() -> None:
    rows = [{**row, "problem": "one"} for row in steps("log_prob")]
    with pytest.raises(SpecguardError, match="all steps are of one problem"):
        fit(rows, VerifierConfig(), "beta", 0.05)


def test_steps_are_labelled_by_where_they_lead() -> None:
    solver = specguard.load("tiny", backend="cpu", num_candidates=2)
    [item] = load_dataset("tiny", limit=1).items
    with Grader() as grader:
        rows = label_steps(solver, item, grader)
        assert len(rows) == len(solver.solve(item.problem, method="target").steps)
        for row in rows:
            assert {"log_prob", "grounding", "consistency"} <= row["signals"].keys()
        wrong = type(item)(item.id, item.problem, "1000003")
        assert label_steps(solver, wrong, grader) == []


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECGUARD_CONFIG_DIR", str(tmp_path / "settings"))
    return tmp_path / "settings"


def profile(target: str | None = None) -> Profile:
    verifier = VerifierConfig(weights={"log_prob": 1.0}, bounds={"log_prob": (-3.0, 0.0)})
    draft = fingerprint(str(TINY / "draft"))
    return Profile("mine", draft, target or fingerprint(str(TINY / "target")), verifier, {"auc": 1})


def test_a_profile_is_what_it_was_when_it_is_read_again(settings: Path) -> None:
    save_profile(profile())
    assert find_profile("mine") == profile()
    solver = specguard.load("tiny", backend="cpu", profile="mine")
    assert solver.config.verifier == profile().verifier
    with pytest.raises(UsageError, match="profiles: mine"):
        raise_with_hint("other")
    for name in "../mine", "", "a b":
        with pytest.raises(UsageError, match="no name"):
            find_profile(name)


def raise_with_hint(name: str) -> None:
    try:
        find_profile(name)
    except UsageError as error:
        raise UsageError(f"{error.message} {error.hint}") from error


def test_a_profile_refuses_another_pair_before_it_is_loaded(settings: Path) -> None:
    save_profile(profile(target=fingerprint(str(TINY / "draft"))))
    with pytest.raises(SpecguardError, match="fitted to another target"):
        specguard.load("tiny", backend="cpu", profile="mine", progress=pytest.fail)
    # Plain decoding by the draft loads no target.
    assert specguard.load("tiny", backend="cpu", profile="mine", method="draft").target is None


def test_a_damaged_profile_is_named(settings: Path) -> None:
    path = save_profile(profile())
    path.write_text(path.read_text().replace("threshold = 0.7", 'threshold = "high"'))
    with pytest.raises(SpecguardError, match=r"mine\.toml cannot be read"):
        find_profile("mine")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


CALIBRATE = ("calibrate", "mine", "--models", "tiny", "--backend", "cpu", "--limit", 6)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Problems whose steps were labelled; the labels are made up."""
    rows = steps("log_prob")
    ids: list[str] = []

    def labelled(solver: Any, item: Any, grader: Any) -> list[dict[str, Any]]:
        ids.append(item.id)
        return rows[40 * int(item.id) : 40 * (int(item.id) + 1)]

    monkeypatch.setattr("specguard.calibration.labels.label_steps", labelled)
    return ids


def test_calibrate_writes_a_profile_that_solve_takes(settings: Path, asked: list[str]) -> None:
    result = run(*CALIBRATE)
    assert result.exit_code == 0, result.output
    assert "240 steps" in result.stdout
    assert {file.name for file in (settings / "profiles").iterdir()} >= {
        "mine.toml",
        "mine.jsonl",
        "mine.png",
    }
    assert len(asked) == 6
    # Labels are not worked out again for another fit.
    assert run(*CALIBRATE, "--fit", "logistic").exit_code == 0
    assert len(asked) == 6
    solved = run("solve", PROBLEM, "--quiet", "--backend", "cpu", "--profile", "mine")
    assert solved.stdout == "33\n"
    missing = run("solve", PROBLEM, "--profile", "yours")
    assert missing.exit_code == 2
    assert "no profile is called 'yours'" in missing.stderr


def test_what_a_failed_calibration_leaves_is_named(
    settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specguard.calibration.labels.label_steps", few_steps)
    few = run(*CALIBRATE)
    assert few.exit_code == 1
    labels = settings / "profiles" / "mine.jsonl"
    assert "too few to fit to" in few.stderr
    assert f"the labels so far are kept: {labels}" in few.stderr
    assert list(labels.parent.iterdir()) == [labels]  # and no lock
    labels.unlink()
    monkeypatch.setattr("specguard.calibration.labels.label_steps", interrupted)
    assert run(*CALIBRATE).exit_code == 130
    assert list(labels.parent.iterdir()) == []


def few_steps(solver: Any, item: Any, grader: Any) -> list[dict[str, Any]]:
    return steps("log_prob", 1)


def interrupted(solver: Any, item: Any, grader: Any) -> list[dict[str, Any]]:
    raise KeyboardInterrupt


def test_labels_are_known_again_by_the_settings_that_differ_from_the_defaults(
    settings: Path, asked: list[str]
) -> None:
    """So that a new setting, which has a default, leaves labels of before what they were."""
    assert run(*CALIBRATE, "--k", "3").exit_code == 0
    with (settings / "profiles" / "mine.jsonl").open() as file:
        recorded = json.loads(file.readline())["config"]
    assert recorded.keys() == {"version", "settings"}
    changes = recorded["settings"]
    assert changes.pop("num_candidates") == 3
    # The pair's own draft cost, that the target does not select, and that no verifier is fitted.
    assert changes.keys() <= {"draft_cost", "selector", "verifier"}
    assert changes["verifier"] == {"weights": {}}
    refused = run(*CALIBRATE, "--k", "4")
    assert refused.exit_code == 1
    assert "is of another run: config was" in refused.stderr
    assert len(asked) == 6

"""Fitted profiles: the user's and those that are shipped, when they are used, and the commands."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

import specguard
from specguard.core import SpecguardError, UsageError, VerifierConfig
from specguard.loading import choose, configure
from specguard.models import profiles
from specguard.models.pairs import PAIRS
from specguard.models.profiles import (
    Profile,
    choose_profile,
    find_profile,
    fingerprint,
    profiles_folder,
    save_profile,
)
from tests.conftest import TINY
from tests.test_cli import SHELLS, invoke

DRAFT, TARGET = str(TINY / "draft"), str(TINY / "target")
VERIFIER = VerifierConfig(weights={"log_prob": 1.0}, bounds={"log_prob": (-3.0, 0.0)})


def fitted(name: str, threshold: float = 0.7, **changes: object) -> Profile:
    verifier = replace(VERIFIER, threshold=threshold)
    made = Profile(name, fingerprint(DRAFT), fingerprint(TARGET), verifier, {"auc": 0.9}, "gsm8k")
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of profiles as they come with the package: one, of the pair qwen2.5-coder."""
    folder = tmp_path / "fitted"
    folder.mkdir()
    monkeypatch.setattr(profiles, "_SHIPPED", folder)
    profile = fitted("qwen2.5-coder", threshold=0.6, pair="qwen2.5-coder")
    (folder / "qwen2.5-coder.json").write_text(json.dumps(profile.to_dict()))
    return folder


SHIPPED = sorted(profiles._SHIPPED.glob("*.json"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_what_is_shipped_can_be_read_and_names_its_pair(file: Path) -> None:
    profile = find_profile(file.stem)
    assert profile.name == file.stem
    assert profile.pair in PAIRS
    assert profile.description
    assert profile.verifier.is_calibrated


@pytest.mark.parametrize("weights", ["torch", "mlx"])
def test_a_pair_is_verified_as_the_profile_shipped_with_it_says(
    shipped: Path, weights: str
) -> None:
    profile = choose_profile(None, *PAIRS["qwen2.5-coder"].sources(weights))
    assert profile is not None
    assert (profile.name, profile.verifier.threshold) == ("qwen2.5-coder", 0.6)
    assert choose_profile(None, *PAIRS["qwen2.5-coder-0.5b-7b"].sources(weights)) is None
    assert choose_profile("none", *PAIRS["qwen2.5-coder"].sources(weights)) is None


def test_it_is_used_in_a_run_and_said(shipped: Path) -> None:
    choice = choose("qwen2.5-coder", "cpu")
    assert configure(choice).verifier.threshold == 0.6
    assert configure(choose("qwen2.5-coder", "cpu", profile="none")).verifier.threshold == 0.7
    assert (
        configure(choose("qwen2.5-coder", "cpu", target="/some/target")).verifier.threshold == 0.7
    )


def test_the_same_weights_are_known_by_their_fingerprints_too(shipped: Path) -> None:
    result = invoke("solve", SHELLS, "--draft", DRAFT, "--target", TARGET)
    assert "verified by profile 'qwen2.5-coder', shipped with this pair, fitted on gsm8k" in (
        result.stderr
    )
    assert "Uncalibrated" not in result.stderr
    without = invoke("solve", SHELLS, "--draft", DRAFT, "--target", TARGET, "--profile", "none")
    assert "verified by profile" not in without.stderr
    assert "Uncalibrated" in without.stderr


def test_the_user_s_own_profile_comes_first(shipped: Path) -> None:
    solver = specguard.load(draft=DRAFT, target=TARGET, backend="cpu")
    assert solver.config.verifier.threshold == 0.6
    for name, threshold, age in ("old", 0.3, 100), ("new", 0.4, 0):
        path = save_profile(fitted(name, threshold))
        os.utime(path, (1e9 - age, 1e9 - age))
    solver = specguard.load(draft=DRAFT, target=TARGET, backend="cpu")
    assert solver.config.verifier.threshold == 0.4
    assert solver.notes[0].startswith("verified by profile 'new', your own, fitted on gsm8k")
    named = specguard.load(draft=DRAFT, target=TARGET, backend="cpu", profile="old")
    assert named.config.verifier.threshold == 0.3
    assert named.notes == []
    given = specguard.load(draft=DRAFT, target=TARGET, backend="cpu", verifier=VERIFIER)
    assert given.config.verifier == VERIFIER
    # A plain method has nothing to be verified.
    assert specguard.load(draft=DRAFT, target=TARGET, backend="cpu", method="target").notes == []


def test_one_that_is_damaged_or_of_another_pair_is_passed_over_unless_it_is_named() -> None:
    save_profile(fitted("other", target="0" * 16))
    damaged = save_profile(fitted("damaged"))
    damaged.write_text("verifier = [")
    solver = specguard.load("tiny", backend="cpu")
    assert solver.config.verifier == PAIRS["tiny"].verifier
    with pytest.raises(SpecguardError, match="cannot be read"):
        specguard.load("tiny", backend="cpu", profile="damaged")
    with pytest.raises(SpecguardError, match="fitted to another target"):
        specguard.load("tiny", backend="cpu", profile="other")


def test_one_of_the_same_name_hides_the_shipped_one_until_it_is_removed(shipped: Path) -> None:
    save_profile(fitted("qwen2.5-coder", threshold=0.5))
    assert find_profile("qwen2.5-coder").verifier.threshold == 0.5
    result = invoke("profiles", "remove", "qwen2.5-coder")
    assert result.exit_code == 0
    assert "shipped is used again" in result.stderr
    assert find_profile("qwen2.5-coder").verifier.threshold == 0.6
    refused = invoke("profiles", "remove", "qwen2.5-coder")
    assert refused.exit_code == 2
    assert "--profile none" in refused.stderr
    assert (shipped / "qwen2.5-coder.json").exists()


def test_profiles_are_listed(shipped: Path) -> None:
    save_profile(fitted("mine"))
    save_profile(fitted("damaged")).write_text("verifier = [")
    (profiles_folder() / "failed.jsonl").write_text("{}\n")
    result = invoke("profiles")
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert lines.keys() == {"profile", "mine", "damaged", "qwen2.5-coder"}
    for word in "yours", "log_prob 1.00", "0.70", "0.900", "gsm8k":
        assert word in lines["mine"]
    assert "shipped" in lines["qwen2.5-coder"]
    assert "cannot be read" in lines["damaged"]
    assert "failed.jsonl" in result.stderr
    listed = json.loads(invoke("profiles", "--json").stdout)["profiles"]
    assert [profile["name"] for profile in listed] == ["mine", "qwen2.5-coder"]


def test_without_profiles_the_list_says_how_to_fit_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "_SHIPPED", tmp_path / "no such folder")
    result = invoke("profiles")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "specguard calibrate" in result.stderr


def test_a_profile_is_shown_and_shipped_as_it_is_shown(shipped: Path) -> None:
    save_profile(fitted("mine"))
    shown = invoke("profiles", "show", "mine")
    for word in "mine.toml", "log_prob 1.00", "-3 to 0", "auc", "the target":
        assert word in shown.stdout
    data = json.loads(invoke("profiles", "show", "mine", "--json").stdout)
    name = {"name": "shown", "pair": "qwen3"}
    (shipped / "shown.json").write_text(json.dumps({**data, **name}))
    assert find_profile("shown") == fitted("shown", pair="qwen3")
    assert "shipped with the pair qwen3" in invoke("profiles", "show", "shown").stdout
    missing = invoke("profiles", "show", "yours")
    assert (missing.exit_code, "profiles: mine" in missing.stderr) == (2, True)


def test_a_profile_is_removed_and_its_labels_are_kept_unless_asked() -> None:
    folder = profiles_folder()
    for labels in (), ("--labels",):
        path = save_profile(fitted("mine"))
        for file in "mine.png", "mine.jsonl", ".mine.jsonl.lock", "mine2.toml":
            (folder / file).write_text("x")
        result = invoke("profiles", "remove", "mine", *labels)
        assert result.exit_code == 0
        left = {file.name for file in folder.iterdir()}
        kept = {"mine.jsonl", ".mine.jsonl.lock"} if not labels else set()
        assert left == {"mine2.toml", *kept}
        assert str(path) in result.stderr
        assert ("kept" in result.stderr) == (not labels)
    for name, message in ("mine", "no profile is called"), ("../mine", "no name for a profile"):
        refused = invoke("profiles", "remove", name)
        assert (refused.exit_code, message in refused.stderr) == (2, True)


def test_no_profile_may_be_called_none() -> None:
    with pytest.raises(UsageError, match="no name"):
        save_profile(fitted("none"))


def test_calibrating_begins_with_the_pair_s_own_verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    save_profile(fitted("before", threshold=0.1))
    seen: list[VerifierConfig] = []

    def labelled(solver: specguard.Solver, *_: object) -> list[object]:
        seen.append(solver.config.verifier)
        return []

    monkeypatch.setattr("specguard.calibration.labels.label_steps", labelled)
    result = invoke("calibrate", "after", "--models", "tiny", "--limit", "1")
    assert result.exit_code == 1  # no steps to fit to
    assert seen[0].threshold == PAIRS["tiny"].verifier.threshold


def test_the_pair_s_page_names_its_verifier(shipped: Path) -> None:
    assert "profile qwen2.5-coder" in invoke("models", "show", "qwen2.5-coder").stdout
    (shipped / "qwen2.5-coder.json").unlink()
    assert "calibrate" in invoke("models", "show", "qwen2.5-coder").stdout
    assert "fitted to this pair" in invoke("models", "show", "tiny").stdout


@pytest.mark.parametrize(
    "path", sorted((Path(profiles.__file__).parent / "fitted").glob("*.json")), ids=lambda p: p.stem
)
def test_a_shipped_profile_fits_its_pair_and_may_be_read_along(path: Path) -> None:
    profile = find_profile(path.stem)
    assert profile.pair is not None
    assert profile.name == path.stem
    pair = PAIRS[profile.pair]
    assert profile.fits("draft", pair.draft["torch"])
    assert profile.fits("target", pair.target["torch"])
    assert profile.verifier.is_calibrated
    assert profile.verifier.can_only_fall
    assert profile.figures["wrong_accepted"] < 0.1 < profile.figures["right_accepted"]

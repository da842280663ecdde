"""The engine of docs/extending.md: made from the page, installed, found by name, and right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from specguard import load
from specguard.core import Sampling, SpecguardError, VerifierConfig
from specguard.core.config import PRESETS
from specguard.models.tiny import problems
from tests.conftest import ROOT, TINY
from tests.pages import README, files
from tests.test_cli import invoke

PAGE = ROOT / "docs" / "extending.md"
ENGINE = ("plain_engine/engine.py", "plain_engine/backend.py")
PROBLEM = "Mia has 24 shells. Mia finds 9 more shells. How many shells does Mia have?"


def test_the_engine_is_short() -> None:
    count = sum(len(files(PAGE)[name].splitlines()) for name in ENGINE)
    assert count <= 150
    for page in PAGE, README:
        assert f"{count} lines" in page.read_text("utf-8"), page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package of the page, as pip installs it."""
    package, site = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("site")
    for name, code in {**files(PAGE), "plain_engine/__init__.py": ""}.items():
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(code, "utf-8")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, *offline, "--target", site, package], check=True)
    return site


@pytest.mark.slow
def test_the_installed_engine_is_listed_and_solves(site: Path) -> None:
    listed = specguard(site, "backends").stdout.splitlines()
    assert any(line.split()[:2] == ["plain", "yes"] for line in listed)
    sources = ["--draft", str(TINY / "draft"), "--target", str(TINY / "target")]
    solved = specguard(site, "solve", "--backend", "plain", *sources, "--k", "2", PROBLEM)
    assert "Answer: 33" in solved.stdout
    assert "attention" not in solved.stderr  # the usual verifier needs none


def specguard(site: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "specguard.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)


@pytest.mark.slow
def test_it_writes_what_the_built_in_engine_writes(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(site)
    settings = {
        "num_candidates": 3,
        "sampling": Sampling(2.0, 0.95),  # so that candidates differ, and some are rejected
        "selector": "ngram",
        "draft_cost": None,
        "max_tokens": 60,
        "detail": True,
    }
    plain = load("tiny", backend="plain", **settings)
    built_in = load("tiny", backend="cpu", **settings)
    text = next(problems.stream(problems.HELD_OUT)).text
    own, expected = (json.loads(solver.solve(text).to_json()) for solver in (plain, built_in))
    assert own["text"] == expected["text"]
    assert own["is_reproducible"]
    assert {step["author"] for step in own["steps"]} == {"draft", "target"}
    for step, other in zip(own["steps"], expected["steps"], strict=True):
        assert step["decision"] == other["decision"]
        assert step["num_reused"] == other["num_reused"]
        for candidate, same in zip(step["candidates"], other["candidates"], strict=True):
            assert candidate["token_ids"] == same["token_ids"]
            assert candidate["finish"] == same["finish"]
            assert candidate["token_logprobs"] == pytest.approx(same["token_logprobs"], abs=1e-4)
        assert step["tokens"]["entropies"] == pytest.approx(other["tokens"]["entropies"], abs=1e-4)


def test_its_pair_is_listed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "my-coder" not in invoke("models").stdout
    monkeypatch.syspath_prepend(site)
    assert "my-coder" in invoke("models").stdout


def test_what_it_lacks_is_refused_where_it_was_asked_for(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(site)
    paper = load("tiny", backend="plain", verifier=VerifierConfig(**PRESETS["paper"]))
    with pytest.raises(SpecguardError, match="has no attention") as refused:
        paper.solve(PROBLEM)
    assert "backend 'plain' does not capture it" in refused.value.message
    with pytest.raises(SpecguardError, match="has no choices"):
        paper.solve(PROBLEM, method="sd")

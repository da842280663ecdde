"""Completion in shells, and the package run as a module."""

import os
import subprocess
import sys

import pytest

from specguard.cli.completion import SHELLS, VARIABLE
from specguard.models.pairs import PAIRS
from tests.test_cli import invoke


def complete(*words: str) -> list[str]:
    """What a shell would offer for the last of these words."""
    settings = {
        VARIABLE: "bash_complete",
        "COMP_WORDS": " ".join(("specguard", *words)),
        "COMP_CWORD": str(len(words)),
    }
    result = subprocess.run(
        [sys.executable, "-m", "specguard"],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.partition(",")[2] for line in result.stdout.splitlines()]


def test_commands_and_pairs_are_completed() -> None:
    assert complete("prof") == ["profiles"]
    assert complete("solve", "--models", "llama") == [
        name for name in PAIRS if name.startswith("llama")
    ]


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_its_script(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke("completion", shell)
    assert result.exit_code == 0, result.output
    assert f"{VARIABLE}={shell}_complete" in result.stdout
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    assert invoke("completion").stdout == result.stdout


def test_a_shell_that_is_not_known_is_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/csh")
    result = invoke("completion")
    assert result.exit_code == 2
    assert "bash, zsh, fish" in result.stderr


def test_the_package_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "specguard", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("specguard, version")

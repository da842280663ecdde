"""Nobody is called unless somebody asks: commands in a world without a network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROBLEM

# Seen even where the error of a failed attempt would be swallowed.
NOTICED, NOTICE = (
    97,
    """
import os, sys

def notice(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        os.write(2, f"{event} {arguments!r}".encode())
        os._exit(97)

sys.addaudithook(notice)
""",
)


def isolated() -> list[str]:
    """What runs a command in a network namespace of its own, where not even loopback is up."""
    prefix = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"]).returncode != 0:
        pytest.skip("there are no network namespaces here")
    return prefix


def run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    (folder / "sitecustomize.py").write_text(NOTICE)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    environment.pop("HF_HUB_OFFLINE")  # which the tests set, and users do not
    command = [*isolated(), sys.executable, "-m", "specguard.cli", *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("solve", PROBLEM, "--backend", "cpu", "--trace", "page.html"),
        ("solve", PROBLEM, "--backend", "mlx"),
        ("bench", "--limit", "2", "--methods", "target,specguard", "--output", "run"),
        ("bench", "speed", "--count", "1", "--k", "1"),
        ("models",),
        ("backends",),
        ("profiles",),
    ],
    ids=lambda arguments: " ".join(arguments[::2]),
)
def test_what_is_on_this_disk_needs_no_network_and_tries_none(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    if "mlx" in arguments:
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    result = run(tmp_path, *arguments)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_models_that_are_not_here_are_not_fetched(tmp_path: Path) -> None:
    result = run(tmp_path, "solve", PROBLEM, "--draft", "owner/draft", "--target", "owner/target")
    assert result.returncode == 1
    assert "specguard models pull" in result.stderr


@pytest.mark.slow
def test_what_is_asked_for_is_noticed(tmp_path: Path) -> None:
    result = run(
        tmp_path,
        "solve",
        PROBLEM,
        "--draft",
        "http://127.0.0.1:9",
        "--target",
        "http://127.0.0.1:9",
    )
    assert result.returncode == NOTICED, result.stderr

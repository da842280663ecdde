"""The harness that tries reliability, at a size for tests; docs/reliability.md has the whole."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

RUNS = {
    "invocations": ("--number", "12", "--seed", "7"),
    "kills": ("--kills", "2", "--only", "solve --problems"),
    "soak": ("--number", "24", "--problems", "6"),
    "determinism": ("--problems", "2", "--circumstance", "again", "--setting", "sd, greedy"),
}


@pytest.mark.parametrize("module", RUNS)
def test_nothing_is_found_in_a_short_run(module: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.reliability.{module}", *RUNS[module]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout

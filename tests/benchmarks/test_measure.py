"""``benchmarks.measure``: a backend decides as it does itself, and both memories are read."""

import pytest
from click.testing import CliRunner

from benchmarks.measure import main


@pytest.mark.slow
def test_backends_are_compared_and_their_memory_is_read() -> None:
    arguments = ["compare", "--count", "1", "--backends", "cpu", "cpu"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("| 1 of 1 |") == 4
    assert result.stdout.count("MiB resident once loaded") == 2

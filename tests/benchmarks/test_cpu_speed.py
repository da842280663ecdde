"""``benchmarks.cpu_speed``: one table of a model's speed, beside that of its own library."""

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

from benchmarks.cpu_speed import main, seconds_per_step, table
from specguard.models.pairs import BUILT_IN_PAIR, find_pair


def test_a_model_is_timed_beside_transformers() -> None:
    _, target = find_pair(BUILT_IN_PAIR).sources("torch")
    options = ["--tokens", "8", "--rows", "2", "--rounds", "1", "--read", "5"]
    result = CliRunner().invoke(main, [target, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "torch.float32" in result.stdout
    lines = [line.split(" | ")[0] for line in result.stdout.splitlines() if line.startswith("|")]
    assert lines[2:] == [
        "| 1 row, tokens/s",
        "| 2 rows, tokens/s",
        "| scoring 5 tokens, steps of one row",
    ]


def test_the_reading_of_the_prompt_is_no_step() -> None:
    calls = []
    seconds_per_step(lambda num_rows, num_tokens: calls.append((num_rows, num_tokens)), 3, 24)
    assert calls == [(3, 1), (3, 25)]


def test_ratios_are_medians_over_rounds() -> None:
    slow, quick = (0.2, 0.3, 0.4, 0.8, 0.3), (0.1, 0.3, 0.2, 0.4, 0.2)
    found = table([slow, quick, quick], rows=8, read=30)
    assert "| 1 row, tokens/s | 10.0 | 3.3 | 3.00 |" in found
    assert "| 8 rows, tokens/s | 40.0 | 20.0 | 2.00 |" in found
    assert "| scoring 30 tokens, steps of one row | 2.00 |" in found

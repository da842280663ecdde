"""``benchmarks.context``: one line a length, shortest first, and the table made of them."""

import json

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

from benchmarks.context import JOBS, ContextLine, context_table, main
from specguard import UsageError


def run(*arguments: object) -> str:
    options = ["--backend", "cpu", "--layers", "2", "--hidden", "64", "--k", "2", "--rounds", "1"]
    arguments = (*options, *map(str, arguments))
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_contexts_are_timed_in_order() -> None:
    data = json.loads(run("--length", 80, "--length", 70, "--json"))
    assert [line["length"] for line in data["lines"]] == [70, 80]
    for line in data["lines"]:
        assert line["seconds"].keys() == set(JOBS)
        assert min(line["seconds"].values()) > 0
    assert data["machine"]["backend"] == "cpu"
    assert "| 70 | " in run("--length", 70)


def test_a_hidden_size_that_no_model_has_is_refused() -> None:
    with pytest.raises(UsageError, match="multiple of 64"):
        run("--hidden", 100)


def test_the_table_says_what_more_context_costs() -> None:
    table = context_table([ContextLine(1000, dict.fromkeys(JOBS, 0.001), 1.04)])
    assert "| 1000 | 1.00 |" in table
    assert "| 1.040 | 2.00 |  |" in table
    two = [ContextLine(n * 1000, dict.fromkeys(JOBS, n * 0.001), 1.0) for n in (1, 3)]
    assert context_table(two).endswith("| 6.00 | 2.000 |\n")

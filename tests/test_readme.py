"""The README: short, its output is what the command prints, its code runs."""

import re

import pytest

from tests.pages import README, blocks, commands
from tests.test_cli import invoke


def test_it_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 150


def test_the_output_shown_is_what_the_command_prints() -> None:
    [shown] = blocks(README, "text")
    [arguments] = [command[1:] for command in commands(README) if command[1] == "solve"]
    result = invoke(*arguments)
    hint, *steps, statistics = shown.splitlines()
    said, measured = result.stderr.splitlines()
    assert said == hint
    assert [line.rstrip() for line in result.stdout.splitlines()] == steps
    # Times differ, counts do not.
    _, tokens, _, *counts = measured.split(" | ")
    assert [tokens, *counts] == [statistics.split(" | ")[1], *statistics.split(" | ")[3:]]


@pytest.mark.parametrize("block", blocks(README, "python"))
def test_python_blocks_run(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_block(block, capsys)


def run_block(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What a block says that it prints stands behind "#>" at its end."""
    exec(compile(block, "page", "exec"), {"__name__": "page"})
    printed = capsys.readouterr().out.splitlines()
    assert printed == re.findall(r"^#> (.*)$", block, re.MULTILINE)

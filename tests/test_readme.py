"""The README's code runs, and its commands exist."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from specguard.cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("index", range(len(python_blocks())))
def test_python_blocks_run(index: int, capsys: pytest.CaptureFixture[str]) -> None:
    block = python_blocks()[index]
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out.splitlines()
    # What a block says that it prints stands behind "#>" at its end.
    assert printed == re.findall(r"^#> (.*)$", block, re.MULTILINE)


def test_the_example_of_an_own_model_is_short() -> None:
    [block] = [block for block in python_blocks() if "a LanguageModel" in block]
    assert len(block.splitlines()) <= 40


def test_named_options_exist() -> None:
    help_text = "".join(
        CliRunner().invoke(main, [command, "--help"], catch_exceptions=False).output
        for command in ("solve", "bench", "calibrate")
    )
    for flag in set(re.findall(r"`(--[a-z-]+)", README)):
        assert flag in help_text, flag

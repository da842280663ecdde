"""The project's pages, and what is taken from them: code blocks, commands, links."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

README = ROOT / "README.md"
PAGES = (
    README,
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "models" / "tiny" / "README.md",
    ROOT / "benchmarks" / "README.md",
)
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_COMMAND = re.compile(r"(specguard|python -m (benchmarks|recipes)\.?\S*)(\s|$)")


def name_of(page: Path) -> str:
    """How a test's parameter is called."""
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """Code blocks in a language."""
    return [code for kind, code in _FENCED.findall(page.read_text("utf-8")) if kind == language]


def files(page: Path) -> dict[str, str]:
    """Code blocks that have a file's name in front of them, by that name."""
    named = re.compile(r"`([\w/.-]+)`:\n\n```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return dict(named.findall(page.read_text("utf-8")))


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return _FENCED.sub("", page.read_text("utf-8"))


def quoted(page: Path) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(page: Path) -> Iterator[list[str]]:
    """Every command of ours that a page shows in a block, as its arguments."""
    for line in "\n".join(blocks(page, "sh")).splitlines():
        yield from _ours(line)
    for line in re.findall(r"^ {4}(\S.*)$", prose(page), re.MULTILINE):
        if _COMMAND.match(line):
            yield from _ours(line)


def quoted_commands(page: Path) -> list[list[str]]:
    """Commands between single backticks, which may lack what they need to run."""
    return [shlex.split(text) for text in quoted(page) if _COMMAND.match(text)]


def _ours(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    command: list[str] = []
    for token in [*lexer, ";"]:
        if token not in ("&&", ";", "|", ">"):
            command.append(token)
            continue
        while command and re.match(r"[A-Z_]+=", command[0]):
            del command[0]
        if _COMMAND.match(" ".join(command)):
            yield command
        command = []

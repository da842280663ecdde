"""The pages: links lead somewhere, commands and names exist, Python runs, what is shown is true."""

import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

import click
import pytest

from specguard.bench.methods import known_methods
from specguard.cli.main import main
from specguard.core import ALL_FEATURES, SolveConfig
from specguard.core.records import SCHEMA_VERSION, Solution, StepRecord
from tests.conftest import ROOT
from tests.pages import PAGES, README, blocks, commands, name_of, prose, quoted, quoted_commands
from tests.test_readme import run_block

DOCS = ROOT / "docs"
pages = pytest.mark.parametrize("page", PAGES, ids=name_of)


@pages
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("index", [README, DOCS / "README.md"], ids=name_of)
def test_every_page_is_linked(index: Path) -> None:
    text = index.read_text("utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name == "README.md" or f"({page.relative_to(index.parent)})" in text, page.name


@pages
def test_commands_parse(page: Path) -> None:
    for words in commands(page):
        try:
            parse(words, is_whole=True)
        except click.ClickException as error:
            pytest.fail(f"{' '.join(words)}: {error.message}")


@pages
def test_quoted_commands_and_their_options_exist(page: Path) -> None:
    for words in quoted_commands(page):
        try:
            parse(words, is_whole=False)
        except click.ClickException as error:
            pytest.fail(f"{' '.join(words)}: {error.message}")


def parse(words: list[str], is_whole: bool) -> None:
    """Read a command as click does, without running it; what is not whole may lack arguments."""
    if words[0] == "specguard":
        _parse(main, words[1:], is_whole)
        return
    module: Any = import_module(words[2])  # python -m MODULE
    if not hasattr(module, "main"):
        module = import_module(f"{words[2]}.__main__")
    _parse(module.main, words[3:], is_whole=False)  # some want files that a run leaves


def _parse(
    command: click.Command,
    arguments: list[str],
    is_whole: bool,
    parent: click.Context | None = None,
) -> None:
    # As it is called: a command keeps the help option that it was first asked for.
    context = click.Context(command, parent, **command.context_settings)
    _, rest, _ = command.make_parser(context).parse_args(list(arguments))
    if isinstance(command, click.Group) and rest:
        inner = command.get_command(context, rest[0])
        if inner is None:
            raise click.UsageError(f"no command is called {rest[0]!r}")
        _parse(inner, rest[1:], is_whole, context)
    elif is_whole:
        command.make_context(command.name, list(arguments), parent)


@pytest.mark.parametrize(
    "words",
    [
        ["specguard", "solve", "x", "--no-such-option"],
        ["specguard", "solve", "x", "--method", "magic"],
        ["specguard", "trace"],
        ["specguard", "bench", "magic"],
        ["python", "-m", "benchmarks.context", "--no-such-option"],
    ],
)
def test_what_does_not_parse_is_noticed(words: list[str]) -> None:
    with pytest.raises(click.ClickException):
        parse(words, is_whole=True)


@pytest.mark.parametrize("page", [README, *sorted(DOCS.glob("*.md"))], ids=name_of)
def test_named_options_exist(page: Path) -> None:
    known = {name for option in _options(main) for name in option.opts} | {"--help"}
    named = {quote.split()[0] for quote in quoted(page) if quote.startswith("--")}
    assert named - known == set()


def _options(command: click.Command) -> list[click.Parameter]:
    inner = command.commands.values() if isinstance(command, click.Group) else ()
    return [*command.params, *(option for part in inner for option in _options(part))]


@pages
def test_files_and_names_exist(page: Path) -> None:
    tops = "specguard|backends|models|cli|benchmarks|recipes|tests|docs"
    for quote in quoted(page):
        if re.fullmatch(rf"({tops})/[\w./-]+", quote):
            assert (ROOT / quote).exists(), quote
        elif re.fullmatch(r"(specguard|benchmarks|recipes)(\.\w+)+", quote):
            assert _exists(quote), quote


def _exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    try:
        import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return hasattr(import_module(module), attribute)
    return True


@pytest.mark.parametrize("block", blocks(DOCS / "python.md", "python"))
def test_python_blocks_run(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_block(block, capsys)


def test_the_loop_shown_is_the_loop() -> None:
    [shown] = blocks(DOCS / "how-it-works.md", "python")
    lines = (ROOT / "specguard" / "core" / "loop.py").read_text("utf-8").splitlines(keepends=True)
    count = len(shown.splitlines())
    passages = (dedent("".join(lines[start : start + count])) for start in range(len(lines)))
    assert shown in passages


def test_every_option_of_solve_is_explained() -> None:
    text = (DOCS / "command-line.md").read_text("utf-8")
    options = [part for part in main.commands["solve"].params if isinstance(part, click.Option)]
    assert [option.opts[0] for option in options if option.opts[0] not in text] == []


def test_every_method_is_named() -> None:
    text = (DOCS / "command-line.md").read_text("utf-8")
    sampled = {"draft-sampled", "sd-sampled"}  # "and so on"
    assert {name for name in known_methods(SolveConfig()) if f"`{name}`" not in text} == sampled


def test_every_field_of_the_json_is_explained() -> None:
    text = (DOCS / "python.md").read_text("utf-8")
    names = [field.name for field in (*fields(Solution), *fields(StepRecord))]
    assert [name for name in names if f"`{name}`" not in text] == []
    assert f"| `schema_version` | {SCHEMA_VERSION};" in text


def test_every_feature_is_explained() -> None:
    text = (DOCS / "engines.md").read_text("utf-8")
    assert [feature for feature in ALL_FEATURES if f"| `{feature}` |" not in text] == []

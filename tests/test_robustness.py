"""Places to write to, things to read from, and errors of the world: one line, at once."""

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from specguard.cli.groups import Commands
from specguard.cli.main import main
from specguard.core import SpecguardError
from specguard.files import check_output_file, check_output_folder, write_atomically
from tests.conftest import PROBLEM

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="devices and modes are POSIX")


def invoke(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), input=stdin)


def command(*arguments: str, **settings: Any) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run([sys.executable, "-m", "specguard.cli", *arguments], **settings)


def refused(result: Result, message: str) -> None:
    """One line, perhaps a hint, and nothing was worked out."""
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) <= 2
    assert result.stdout == ""


@POSIX
@pytest.mark.parametrize("argument", ["--trace", "-o"])
def test_places_are_checked_before_any_work(argument: str, tmp_path: Path) -> None:
    solution = tmp_path / "solution.json"
    solution.write_text("{}")

    def write_to(place: object) -> Result:
        if argument == "-o":
            return invoke("trace", solution, "-o", place)
        # No model is loaded: there is none.
        nowhere = "--draft", tmp_path / "none", "--target", tmp_path / "none"
        return invoke("solve", PROBLEM, *nowhere, "--trace", place)

    (tmp_path / "link").symlink_to("/dev/null")
    refused(write_to("/dev/null"), "is a device")
    refused(write_to(tmp_path / "link"), "is a device")
    refused(write_to(tmp_path), "is a folder")
    refused(write_to(tmp_path / "typing" / "eror" / "page.html"), "there is no folder")
    refused(write_to(tmp_path / ("x" * 300)), "File name too long")
    refused(write_to(solution / "page.html"), "Not a directory")
    assert {entry.name for entry in tmp_path.iterdir()} == {"solution.json", "link"}
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


@POSIX
def test_files_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "page.html"
    file.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: path != file)  # root may do anything
    with pytest.raises(SpecguardError, match="may not be written to"):
        check_output_file(file)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(SpecguardError, match="is read-only"):
        check_output_file(tmp_path / "other.html")
    with pytest.raises(SpecguardError, match="is read-only"):
        check_output_folder(tmp_path / "results")


@POSIX
def test_a_link_stays_and_its_file_is_written(tmp_path: Path) -> None:
    page, link = tmp_path / "page.html", tmp_path / "link.html"
    page.write_bytes(b"old")
    page.chmod(0o640)
    link.symlink_to(page.name)
    check_output_file(link)
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert page.read_bytes() == b"new"
    assert stat.S_IMODE(page.stat().st_mode) == 0o640
    with pytest.raises(OSError, match="no regular file"):
        write_atomically(Path("/dev/null"), b"")
    assert {entry.name for entry in tmp_path.iterdir()} == {"page.html", "link.html"}


def test_what_a_killed_process_left_half_written_goes_with_the_next_file(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code = f"""
import os, signal
from pathlib import Path
os.fdopen = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from specguard.files import write_atomically
write_atomically(Path({str(page)!r}), b"half")
"""
    killed = subprocess.run([sys.executable, "-c", code])
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()
    of_another = left.with_name(left.name.replace(f".{left.name.split('.')[-2]}.", ".1."))
    of_another.touch()  # process 1 is always there
    write_atomically(page, b"whole")
    assert {entry.name for entry in tmp_path.iterdir()} == {page.name, of_another.name}


def test_results_need_a_folder_to_be_made_in(tmp_path: Path) -> None:
    result = invoke("bench", "--output", tmp_path / "typing" / "eror", "--limit", 1)
    refused(result, "there is no folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError("no more\nbuffers"), MemoryError(), RecursionError()])
def test_errors_of_the_world_are_a_line_and_a_hint(error: BaseException) -> None:
    @click.group(cls=Commands)
    def group() -> None:
        pass

    @group.command()
    def fail() -> None:
        raise error

    result = CliRunner().invoke(group, ["fail"])
    assert result.exit_code == 1
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["Error", "Hint"]


@POSIX
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
@pytest.mark.parametrize("arguments", [("solve", PROBLEM, "--quiet"), ("backends",), ("--help",)])
def test_a_full_disk_is_said(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        result = command(*arguments, stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 1
    *_, error, hint = result.stderr.decode().splitlines()
    assert "No space left" in error
    assert hint.startswith("Hint: free some space")
    assert b"Traceback" not in result.stderr


@POSIX
@pytest.mark.parametrize("mode", ["", "--json", "--jsonl", "--quiet"])
def test_a_reader_that_has_gone_ends_every_mode_alike(mode: str) -> None:
    arguments = [PROBLEM, "--no-fallback", *filter(None, [mode])]
    process = subprocess.Popen(
        [sys.executable, "-m", "specguard.cli", "solve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
    assert b"Error" not in errors
    assert b"Traceback" not in errors


def test_an_interruption_while_the_command_loads_is_quiet() -> None:
    code = """
import sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "specguard.cli.main":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from specguard.cli.__main__ import main
assert not {"numpy", "click", "specguard.core"} & set(sys.modules)  # nothing that takes time
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert (result.returncode, result.stderr.split()) == (130, [b"Interrupted."])


def test_problems_are_read_from_a_pipe_without_being_asked() -> None:
    assert invoke("solve", "--quiet", stdin=PROBLEM).stdout == "12\n"
    empty = invoke("solve", stdin="")
    assert empty.exit_code == 2
    assert "give one problem" in empty.stderr


def test_a_problem_that_begins_with_a_minus_sign_stands_behind_two() -> None:
    assert "solve -- " in invoke("solve", "-5 + 3").stderr
    assert "built-in pair cannot" in invoke("solve", "--", "-5 + 3").stderr
    assert "solve -- " not in invoke("models", "-5").stderr


@POSIX
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("solve", "--file", "/dev/zero"), "is binary"),
        (("trace", "/dev/zero"), "is a device"),
        (("trace", "/"), "is a folder"),
        (("bench", "--data", "/dev/zero", "--fields", "problem=q,answer=a"), "it is a device"),
    ],
)
def test_what_never_ends_is_not_read(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    more = ("--output", str(tmp_path / "results")) if arguments[0] == "bench" else ()
    result = invoke(*arguments, *more)
    assert result.exit_code in (1, 2)
    assert message in result.stderr


def test_a_problem_too_long_for_any_model_is_refused() -> None:
    result = invoke("solve", "-", stdin="a" * (1 << 24) + "a")
    assert result.exit_code == 2
    assert "too long for a problem" in result.stderr


def test_json_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    for row in '{"q": "\\ud800", "a": 1}', '{"\\ud800": 1}', "[" * 100_000:
        file.write_text(row)
        options = "--data", file, "--fields", "problem=q,answer=a", "--output", tmp_path / "out"
        result = invoke("bench", *options)
        refused(result, "line 1 of")
    (tmp_path / "x.json").write_text("[" * 100_000)
    refused(invoke("trace", tmp_path / "x.json"), "is no JSON")


def commands_of(group: click.Group, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    found = {(*path, name): command for name, command in group.commands.items()}
    for name, command in list(found.items()):
        if isinstance(command, click.Group):
            found |= commands_of(command, name)
    return found


COMMANDS = commands_of(main)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_says_everything(path: tuple[str, ...]) -> None:
    text = invoke(*path, "--help").stdout
    summary = COMMANDS[path].get_short_help_str(limit=1000)
    parent = invoke(*path[:-1], "--help").stdout
    assert " ".join(summary.split()) in " ".join(parent.split()), "it is not cut off"
    if len(path) == 1:
        assert f"specguard {path[0]}" in text.split("Options:")[1], "there is an example"


def test_help_names_defaults_and_methods() -> None:
    text = " ".join(invoke("solve", "--help").stdout.split())
    for default in "(0.7 for several candidates", "(a blank line)", "[default: auto]", "(256)":
        assert default in text
    assert "specguard-target-selects, specguard-draft-verifies" in " ".join(
        invoke("bench", "--help").stdout.split()
    )

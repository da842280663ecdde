"""The terminal: a line that says what is going on and vanishes, steps as they are."""

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from specguard.cli.output import Reporter
from specguard.cli.status import Loading, Solving, StatusLine
from specguard.core import PhaseBegan, Solution, SolveConfig, Solver, TokensDrawn, VerifierConfig
from specguard.core.config import Method
from tests.conftest import TINY
from tests.scripted import Scripted
from tests.test_cli import SHELLS, command

LATEX = "We compute:\n\\[\n  \\frac{1}{2} \\cdot 8 = 4\n\\]\n\n"
ANSWER = "So \\boxed{4}.$"


def terminal(width: int = 80, **more: Any) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, **more)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def shown(*parts: str, width: int = 80) -> str:
    line = StatusLine(terminal(width))
    line.show(lambda: list(parts))
    line.hide()
    return written(line._console)


def test_the_line_is_shown_and_wiped_out() -> None:
    text = shown("step 1: drafting", "12 tokens")
    assert "step 1: drafting, 12 tokens" in text
    assert left_on_screen(text) == ["", ""]
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is back"


def test_the_line_is_one_line_however_narrow_the_terminal_is() -> None:
    parts = "step 12: rewriting", "141 tokens", "12.3 tokens/s"
    assert "step 12: rewriting, 141 tokens, 12.3 tokens/s" in shown(*parts)
    assert "step 12: rewriting, 141 tokens" in shown(*parts, width=40)
    assert "12.3" not in shown(*parts, width=40)
    assert "step 12: r\u2026" in shown(*parts, width=11)


@pytest.mark.parametrize(
    "console",
    [Console(file=io.StringIO(), width=80), terminal(_environ={"TERM": "dumb"})],
    ids=["pipe", "dumb"],
)
def test_there_is_no_line_but_on_a_terminal(console: Console) -> None:
    line = StatusLine(console)
    line.show(lambda: ["step 1: drafting"])
    line.hide()
    assert not line.is_live
    assert written(console) == ""


def test_the_line_says_what_is_done_and_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("specguard.cli.status.time.monotonic", lambda: now)
    solving = Solving("specguard")
    solving.hear(PhaseBegan(0, "propose"))
    now += 3
    assert solving.parts() == ["step 1: drafting", "3 s"]
    solving.hear(TokensDrawn(0, "draft", 0, (5,), "a"))
    assert solving.parts() == ["step 1: drafting", "1 token"]
    solving.hear(TokensDrawn(0, "draft", 1, (5,), "a"))
    now += 2
    for candidate in range(2):
        solving.hear(TokensDrawn(0, "draft", candidate, (6, 7, 8), "bcd"))
    assert solving.parts() == ["step 1: drafting", "8 tokens", "3.0 tokens/s"], "as it is drawn"
    solving.hear(PhaseBegan(0, "verify"))
    assert solving.parts() == ["step 1: verifying", "0 s"]
    now += 1
    solving.hear(PhaseBegan(0, "propose"))  # of a step that is read while it is drafted
    solving.hear(TokensDrawn(0, "draft", 0, (9,), "e"))
    now += 1
    assert solving.parts() == ["step 1: drafting", "9 tokens", "1.8 tokens/s"]
    solving.hear(PhaseBegan(0, "verify"))
    assert solving.parts() == ["step 1: verifying", "0 s"]
    solving.hear(PhaseBegan(0, "rewrite"))
    assert solving.parts() == ["step 1: rewriting", "0 s"]
    solving.hear(PhaseBegan(1, "rewrite"))
    assert solving.parts()[0] == "step 2: writing", "no draft was there to be rewritten"


@pytest.mark.parametrize(("method", "said"), [("target", "writing"), ("draft", "drafting")])
def test_plain_decoding_is_called_what_it_is(method: Method, said: str) -> None:
    solving = Solving(method)
    solving.hear(PhaseBegan(4, "propose"))
    assert solving.parts()[0] == f"step 5: {said}"


def test_loading_says_how_much_was_read() -> None:
    loading = Loading()
    assert loading.parts()[0] == "starting"
    source = str(TINY / "target")
    loading.begin(source)
    name, before, _ = loading.parts()
    content = (TINY / "target" / "model.safetensors").read_bytes()
    _, after, elapsed = loading.parts()
    assert name == "loading target"
    assert re.match(r"\d+ bytes of ", before), "nothing to speak of"
    read, total = after.split(" of ")
    assert read == total == f"{len(content) / 1e6:.1f} MB"
    assert elapsed == "0 s"
    loading.begin("what a third party's backend knows")
    assert len(loading.parts()) == 2


def report(solution: Solution, width: int, is_terminal: bool = True) -> tuple[str, str]:
    """What a reporter prints of a solution: on stdout, on stderr."""
    reporter = Reporter()
    consoles = [
        Console(file=io.StringIO(), force_terminal=is_terminal, width=width, color_system=None)
        for _ in range(2)
    ]
    reporter.out, reporter.err = consoles
    reporter.status = StatusLine(reporter.err)
    for step in solution.steps:
        reporter.step(step, solution.config)
    reporter.finish(solution)
    out, err = map(written, consoles)
    return out, err


def solve(*steps: str) -> Solution:
    verifier = VerifierConfig(weights={"log_prob": 1.0}, bounds={"log_prob": (-2.0, 0.0)})
    engines = Scripted("d", list(steps)), Scripted("t", ["right.\n\n"], {"wrong.\n\n": -1.9})
    return Solver(*engines, SolveConfig(verifier=verifier)).solve("p")


def test_steps_are_printed_as_they_are_with_a_blank_line_between() -> None:
    out, err = report(solve(LATEX, ANSWER), 80)
    assert out.splitlines() == [
        "[1] accepted draft  log-prob 0.95 >= 0.70",
        *LATEX.strip().splitlines(),
        "",
        "[2] accepted draft  log-prob 0.95 >= 0.70",
        "So \\boxed{4}.",
        "",
        "Answer: 4",
    ]
    assert "accepted 2 of 2 drafted steps" in err


def test_forty_columns_are_enough() -> None:
    out, err = report(
        solve("wrong.\n\n", "Twenty-four shells and nine more are 33. " * 2, ANSWER), 40
    )
    assert max(map(len, [*out.splitlines(), *err.splitlines()])) <= 40
    assert "[1] rewritten by target" in out
    assert "draft: wrong." in out
    assert "Twenty-four shells and nine more are 33." in out, "words stay whole"


def test_an_answer_without_a_box_is_marked() -> None:
    out, _ = report(solve("It is Paris.$"), 80)
    assert "Answer (last text, no box): It is Paris." in out


# In a real terminal, from the beginning to the end.


@pytest.fixture
def in_terminal() -> Callable[..., tuple[int, str]]:
    """Runs a command in a terminal: its exit code, and all that it sent there."""
    pty = pytest.importorskip("pty", reason="there are no pseudo terminals here")
    import fcntl
    import termios

    def run(*arguments: str, columns: int = 80, interrupt_at: bytes = b"") -> tuple[int, str]:
        terminal, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        environment = {key: value for key, value in os.environ.items() if key not in UNWANTED}
        process = subprocess.Popen(
            [sys.executable, "-m", "specguard.cli", *arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env={**environment, "TERM": "xterm"},
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        os.close(inner)
        output = b""
        while data := _read(terminal):
            output += data
            if interrupt_at and interrupt_at in output:
                process.send_signal(signal.SIGINT)
                interrupt_at = b""
        os.close(terminal)
        return process.wait(), output.decode()

    return run


UNWANTED = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux says that the other end is closed
        return b""


def left_on_screen(output: str) -> list[str]:
    """The lines that are still there when all is done."""
    lines, place = [""], 0
    for part in re.findall(r"\x1b\[[?\d;]*\w|\n|\r|[^\x1b\n\r]+", output):
        if part == "\n":
            place += 1
            lines += [""] * (place + 1 - len(lines))
        elif part == "\x1b[1A":
            place -= 1
        elif part == "\x1b[2K":
            lines[place] = ""
        elif not part.startswith(("\x1b", "\r")):
            lines[place] += part
    return lines


@pytest.mark.parametrize("backend", ["cpu", pytest.param("mlx", marks=pytest.mark.slow)])
def test_the_terminal_lives_while_a_problem_is_solved(
    backend: str, in_terminal: Callable[..., tuple[int, str]]
) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    arguments = "solve", SHELLS, "--backend", backend, "--no-fallback"
    code, output = in_terminal(*arguments)
    assert code == 0
    for passing in "starting", "loading target, ", "step 1: drafting":
        assert passing in output
    piped = command(*arguments)
    # Nothing else is left, a warning of a library for instance, and pipes see the same.
    printed = [*piped.stderr.decode().splitlines(), *piped.stdout.decode().splitlines()]
    ours = " ".join(" ".join(left_on_screen(output)).split())
    assert _without_times(ours) == _without_times(" ".join(" ".join(_in_order(printed)).split()))


def test_what_libraries_would_say_is_not_for_the_user(tmp_path: Path) -> None:
    pair = tmp_path / "pair"
    shutil.copytree(TINY, pair)
    for role in "draft", "target":
        file = pair / role / "config.json"
        config = json.loads(file.read_text())
        config["rope_parameters"]["unheard_of"] = 1  # of which transformers warns
        file.write_text(json.dumps(config))
    models = ["--draft", str(pair / "draft"), "--target", str(pair / "target"), "--no-fallback"]
    said = command("solve", SHELLS, *models).stderr.decode().splitlines()
    assert len(said) == 2
    assert said[0].startswith("Uncalibrated: ")
    assert " tokens/s | " in said[1]


def _in_order(lines: list[str]) -> list[str]:
    """What is said on standard error, hints first and statistics last, around the rest."""
    [statistics] = [line for line in lines if " tokens/s | " in line]
    return [*(line for line in lines if line != statistics), statistics]


def _without_times(text: str) -> str:
    return re.sub(r"[\d.]+ (s|tokens/s) \|", "", text)


@pytest.mark.slow
def test_an_interrupted_terminal_is_left_in_order(
    in_terminal: Callable[..., tuple[int, str]],
) -> None:
    options = "--k", "1024", "--delimiter", "never", "--max-step-tokens", "8"
    code, output = in_terminal("solve", SHELLS, *options, interrupt_at=b"step 2: ")
    assert code == 130
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l"), "the cursor is back"
    assert [line for line in left_on_screen(output) if line][-1] == "Interrupted."


@pytest.mark.slow
def test_data_in_a_terminal_stands_alone(in_terminal: Callable[..., tuple[int, str]]) -> None:
    code, output = in_terminal("solve", SHELLS, "--json")
    assert code == 0
    assert json.loads(output)["answer"] == "21"

"""Commands in processes of their own, forked from one that has loaded the libraries already.

A fresh interpreter takes seconds to import torch: thousands of commands, or hundreds that are
killed, would mostly be imports. The parent may only import, never compute: threads do not survive
a fork. POSIX alone.
"""

import atexit
import ctypes
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

_CAPABILITIES_VERSION = 0x20080522
_LIBRARIES = ("specguard.cli.main", "torch", "transformers", "huggingface_hub", "math_verify")
_DEFECT = 70  # exit code of a command that ended with a traceback
_NAP = 0.002


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit code, minus the signal that ended it, None for a time-out."""

    code: int | None
    stdout: bytes
    stderr: bytes
    seconds: float

    @property
    def has_traceback(self) -> bool:
        """Whether Python's own report of a defect was printed."""
        return b"Traceback (most recent call last)" in self.stderr


class Command:
    """``specguard ARGUMENTS`` under way; its output goes to files in ``folder``."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        *,
        stdin: bytes = b"",
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        _import_libraries()
        self._files = [folder / name for name in ("stdin", "stdout", "stderr")]
        self._files[0].write_bytes(stdin)
        self._began_at = time.perf_counter()
        self.pid = os.fork()
        if self.pid == 0:
            _run(arguments, self._files, {**os.environ, **(environment or {})}, directory)
        self._code: int | None = None

    def wait(self, seconds: float) -> Ended | None:
        """How it ended; None where it has not after that time."""
        until = time.perf_counter() + seconds
        while self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
            elif time.perf_counter() >= until:
                return None
            else:
                time.sleep(_NAP)
        return self._ended(self._code)

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send it a signal; what it has started hears nothing of it."""
        if self._code is None:
            os.kill(self.pid, number)

    def errors(self) -> bytes:
        """What it has said so far on standard error."""
        return self._files[2].read_bytes() if self._files[2].exists() else b""

    def leaves_others(self, seconds: float) -> bool:
        """Whether processes that it had started are there after that time; these are ended."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return False
            time.sleep(_NAP)
        os.killpg(self.pid, signal.SIGKILL)
        return True

    def finish(self, seconds: float) -> Ended:
        """How it ended; killed, and a time-out, where it lasts longer."""
        ended = self.wait(seconds)
        if ended is None:
            self.stop()
            self.wait(seconds)
            ended = self._ended(None)
        return ended

    def _ended(self, code: int | None) -> Ended:
        out, err = (file.read_bytes() for file in self._files[1:])
        return Ended(code, out, err, time.perf_counter() - self._began_at)


def _import_libraries() -> None:
    for name in _LIBRARIES:
        importlib.import_module(name)


def _run(
    arguments: Sequence[str],
    files: Iterable[Path],
    environment: Mapping[str, str],
    directory: Path | None,
) -> NoReturn:
    """In the child: become a process as the shell would have started it, and run the command."""
    code = _DEFECT
    try:
        atexit._clear()  # what the parent does as it ends, like removing folders
        os.setpgid(0, 0)
        for number, file in enumerate(files):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(file, flags, 0o600), number)
        os.environ.clear()
        os.environ.update(environment)
        if directory is not None:
            os.chdir(directory)
        _obey_permissions()
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)
        # Of the parent's they would write to the parent's files.
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(number, mode, encoding="utf-8", errors=errors, closefd=False)
            for number, mode, errors in (
                (0, "r", "strict"),
                (1, "w", "strict"),
                (2, "w", "backslashreplace"),
            )
        )
        sys.argv = ["specguard", *arguments]
        from specguard.cli.main import main

        try:
            main(prog_name="specguard")
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
            code = _DEFECT
        os._exit(code)


def _obey_permissions() -> None:
    """Root may write anywhere: take that from this process, so that read-only means read-only."""
    if os.geteuid() != 0:
        return
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")

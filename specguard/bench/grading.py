r"""Whether an answer equals the known one, judged by math-verify in a process of its own.

math-verify understands fractions, intervals, sets, tuples and matrices, but an answer such as
``9^{9^{9}}`` keeps it busy for ever, and its own time limit works in a main thread only. So it runs
in a worker that is stopped and started anew when an answer takes too long.
"""

import logging
import multiprocessing
import re
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Literal

from specguard.core.errors import SpecguardError

Reason = Literal["equal", "different", "no answer", "unreadable", "timeout"]

_MEMORY_BYTES = 2 << 30
_START_SECONDS = 120.0
_TEXT_AROUND = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}")
_BLANKS = re.compile(r"\s+(?=\D)|(?<=\D)\s+")  # all but those that part two numbers
_SET_BUILDER = re.compile(r"\\\{\s*\w\s*(?:\||:|\\mid\b)([^{}]*?)\\\}")


@dataclass(frozen=True, slots=True)
class Grade:
    """``reason`` says why an answer counts as wrong, or that it is equal."""

    reason: Reason

    @property
    def is_right(self) -> bool:
        """Whether the answer equals the known one."""
        return self.reason == "equal"


class Grader:
    """Grades answers in a worker process; a context manager that ends it.

    Args:
        seconds: time limit of one answer.

    Raises:
        SpecguardError: math-verify is not installed.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        try:
            import math_verify  # noqa: F401
        except ImportError as error:
            raise SpecguardError(
                "the package math-verify is not installed", "pip install 'specguard[bench]'"
            ) from error
        self._seconds = seconds
        self._worker: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection[tuple[str, str], str] | None = None

    def __enter__(self) -> "Grader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker; grading again starts another."""
        if self._worker is not None and self._pipe is not None:
            self._pipe.close()
            self._worker.kill()
            self._worker.join()
        self._worker = self._pipe = None

    def grade(self, answer: str | None, gold: str) -> Grade:
        r"""Compare an answer, the content of ``\boxed{}``, with the known one."""
        if answer is None or not clean(answer):
            return Grade("no answer")
        if _BLANKS.sub("", clean(answer)) == _BLANKS.sub("", clean(gold)):
            return Grade("equal")
        pipe = self._started()
        try:
            pipe.send((clean(answer), clean(gold)))
            if not pipe.poll(self._seconds):
                self.close()
                return Grade("timeout")
            reason: Reason = pipe.recv()  # type: ignore[assignment]
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.close()  # out of memory, most likely: as hopeless as one that never ends
            return Grade("timeout")
        return Grade(reason)

    def _started(self) -> "Connection[tuple[str, str], str]":
        if self._pipe is not None:
            return self._pipe
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._worker = context.Process(target=_work, args=(theirs,), daemon=True)
        self._worker.start()
        theirs.close()
        self._pipe = ours
        if not ours.poll(_START_SECONDS):
            self.close()
            raise SpecguardError("the grading process does not start")
        ours.recv()
        return ours


def clean(answer: str) -> str:
    r"""An answer without what typesets it: dollars, ``\text`` around words, a full stop."""
    answer = answer.replace("\\$", "").replace("$", "")
    answer = answer.replace("\\!", "").replace("\\,", "").replace("\\dfrac", "\\frac")
    answer = _TEXT_AROUND.sub(r"\1", answer).strip().rstrip(".").strip()
    # Of {x | condition} math-verify reads a part only; the bare condition it reads whole.
    builder = _SET_BUILDER.fullmatch(answer)
    return builder[1].strip() if builder else answer


def _work(pipe: "Connection[str, tuple[str, str]]") -> None:
    _limit_memory()
    from math_verify import parse, verify

    # It logs what it cannot read; that is our business.
    logging.disable(logging.CRITICAL)
    pipe.send("ready")
    while True:
        try:
            answer, gold = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        # Both go the same way, so that what the parser does not see in one it misses in the other.
        found, known = (
            parse(f"$\\boxed{{{text}}}$", parsing_timeout=None) for text in (answer, gold)
        )
        if not known or not found:
            pipe.send("unreadable")
        else:
            equal = verify(known, found, timeout_seconds=None)
            pipe.send("equal" if equal else "different")


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, hard))

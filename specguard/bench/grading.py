r"""Whether an answer equals the known one, judged by math-verify in a process of its own.

math-verify understands fractions, intervals, sets, tuples and matrices, but an answer such as
``9^{9^{9}}`` keeps it busy for ever, and its own time limit works in a main thread only. So it runs
in a worker that is stopped and started anew when an answer takes too long.
"""

import logging
import multiprocessing
import re
from concurrent.futures import TimeoutError as PoolTimeoutError
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Literal

from specguard.core.errors import SpecguardError

Reason = Literal["equal", "different", "no answer", "unreadable", "timeout", "crash"]

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
            from pebble import ProcessPool
        except ImportError as error:
            raise SpecguardError(
                f"the package {error.name} is not installed", "pip install 'specguard[bench]'"
            ) from error
        self._seconds = seconds
        self._new_pool = partial(
            ProcessPool,
            max_workers=1,
            context=multiprocessing.get_context("spawn"),
            initializer=_prepare,
        )
        self._pool = self._new_pool()
        self._is_started = False

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
        self._pool.stop()
        self._pool.join()

    def grade(self, answer: str | None, gold: str) -> Grade:
        r"""Compare an answer, the content of ``\boxed{}``, with the known one.

        Raises:
            SpecguardError: no worker can be started.
        """
        if answer is None or not clean(answer):
            return Grade("no answer")
        if _BLANKS.sub("", clean(answer)) == _BLANKS.sub("", clean(gold)):
            return Grade("equal")
        self._start()
        return Grade(self._work(clean(answer), clean(gold), self._seconds))

    def _start(self) -> None:
        """See to it that a worker works at all: then what fails later is an answer's fault."""
        if not self._pool.active:  # it gives up where a worker dies that has nothing to do
            self.close()
            self._pool, self._is_started = self._new_pool(), False
        if self._is_started:
            return
        reason = self._work("1", "2", _START_SECONDS)
        if reason != "different":
            raise SpecguardError(
                f"the grading process does not start ({reason})",
                "more memory may be needed; python -c 'import math_verify' says what is wrong",
            )
        self._is_started = True

    def _work(self, answer: str, gold: str, seconds: float) -> Reason:
        try:
            reason: Reason = self._pool.schedule(
                _compare, args=(answer, gold), timeout=seconds
            ).result()
        except PoolTimeoutError:
            return "timeout"
        except Exception:
            return "crash"  # out of memory, most likely
        return reason


def clean(answer: str) -> str:
    r"""An answer without what typesets it: dollars, ``\text`` around words, a full stop."""
    answer = answer.replace("\\$", "").replace("$", "")
    answer = answer.replace("\\!", "").replace("\\,", "").replace("\\dfrac", "\\frac")
    answer = _TEXT_AROUND.sub(r"\1", answer).strip().rstrip(".").strip()
    # Of {x | condition} math-verify reads a part only; the bare condition it reads whole.
    builder = _SET_BUILDER.fullmatch(answer)
    return builder[1].strip() if builder else answer


def _prepare() -> None:
    """Once in every worker, before the time of an answer begins."""
    _limit_memory()
    # math-verify logs what it cannot read, and pebble that it does not start: our business.
    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401


def _compare(answer: str, gold: str) -> Reason:
    from math_verify import parse, verify

    # Both go the same way, so that what the parser does not see in one it misses in the other.
    given, known = (parse(f"$\\boxed{{{text}}}$", parsing_timeout=None) for text in (answer, gold))
    if not known or not given:
        return "unreadable"
    return "equal" if verify(known, given, timeout_seconds=None) else "different"


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))

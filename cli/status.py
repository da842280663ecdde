"""The line at the bottom of a terminal that says what is going on; gone before anything is printed.

Knows progress events and model folders. It is drawn by a thread of its own, so that it lives while
a model computes.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.filesize import decimal
from rich.live import Live
from rich.text import Text

from specguard.backends.checkpoint import open_model
from specguard.core import PhaseBegan, Progress, SpecguardError
from specguard.core.config import Method
from specguard.core.records import Phase
from specguard.costs.figure import MEASURING

_DRAWN_A_SECOND = 5
_AT_ONCE = 0.05  # seconds; the first tokens of several candidates
_DOING: dict[Phase, str] = {
    "propose": "drafting",
    "select": "selecting",
    "verify": "verifying",
    "rewrite": "rewriting",
}


class StatusLine:
    """Shows parts of a line, the first ones where there is no room for all, on a terminal only."""

    def __init__(self, console: Console, is_wanted: bool = True) -> None:
        self.is_live = is_wanted and console.is_terminal and not console.is_dumb_terminal
        self._console = console
        self._live: Live | None = None
        self._parts: Callable[[], list[str]] = list

    def __enter__(self) -> "StatusLine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.hide()

    def show(self, parts: Callable[[], list[str]]) -> None:
        """Show what a function says, now and time and again."""
        self._parts = parts
        if self._live is not None:
            self._live.refresh()
        elif self.is_live:
            self._live = Live(
                console=self._console,
                get_renderable=self._line,
                refresh_per_second=_DRAWN_A_SECOND,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()

    def hide(self) -> None:
        """Wipe the line out."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _line(self) -> Text:
        first, *others = self._parts()
        line = first
        for part in others:
            if len(line) + 2 + len(part) >= self._console.width:
                break
            line = f"{line}, {part}"
        return Text(line, style="dim", no_wrap=True, overflow="ellipsis")


class Loading:
    """What is read of a model's files while it is loaded."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._started = time.monotonic()
        self._what = "starting"
        self._num_bytes = 0
        self._num_before = self._num_read = 0

    def begin(self, source: str) -> None:
        """A model is loaded from now on, or what drafting costs is measured."""
        try:
            num_bytes = open_model(source).num_bytes
        except SpecguardError:  # what a third party's backend loads may be anything
            num_bytes = 0
        self._num_bytes, self._num_before, self._num_read = num_bytes, self._taken_in(), 0
        self._what = source if source == MEASURING else f"loading {Path(source).name}"
        self._started = time.monotonic()

    def parts(self) -> list[str]:
        """What is loaded, how far, for how long."""
        elapsed = f"{time.monotonic() - self._started:.0f} s"
        if not self._num_bytes:
            return [self._what, elapsed]
        num_read = min(self._taken_in() - self._num_before, self._num_bytes)
        self._num_read = max(self._num_read, num_read)
        share = f"{decimal(self._num_read)} of {decimal(self._num_bytes)}"
        return [self._what, share, elapsed]

    def _taken_in(self) -> int:
        """Bytes of files that were read or mapped into memory; all memory where it is not known."""
        memory: Any = self._process.memory_info()
        try:
            return int(memory.shared + self._process.io_counters().read_chars)
        # Only Linux tells, and not everywhere.
        except (AttributeError, psutil.Error, OSError, RuntimeError):
            return int(memory.rss)


class Solving:
    """What is going on in a problem that is being solved, from its events."""

    def __init__(self, method: Method) -> None:
        self._doing_by_phase = _DOING if method != "target" else {**_DOING, "propose": "writing"}
        self._step = 0
        self._is_drafted, self._is_counting = False, True
        self._doing = "reading the problem"
        self._num_tokens = self._num_first = 0
        self._started = self._first = time.monotonic()

    def hear(self, event: Progress) -> None:
        """Something has happened."""
        if not isinstance(event, PhaseBegan):
            self._count(len(event.token_ids))
            return
        if event.step != self._step:
            self._step, self._is_drafted = event.step, False
        # A step that is read while it is drafted is drafted and verified by turns.
        if not self._is_drafted or event.phase == "rewrite":
            self._num_tokens = self._num_first = 0
        self._started = time.monotonic()
        self._is_counting = event.phase in ("propose", "rewrite")
        if event.phase == "rewrite" and not self._is_drafted:
            self._doing = "writing"
        else:
            self._doing = self._doing_by_phase[event.phase]
        self._is_drafted |= event.phase == "propose"

    def parts(self) -> list[str]:
        """What is done, and how far it has come."""
        seconds = time.monotonic() - self._started
        doing = f"step {self._step + 1}: {self._doing}"
        if not (self._num_tokens and self._is_counting):
            return [doing, f"{seconds:.0f} s"]
        parts = [doing, "1 token" if self._num_tokens == 1 else f"{self._num_tokens} tokens"]
        num_further = self._num_tokens - self._num_first
        if num_further:
            seconds = time.monotonic() - self._first
            parts.append(f"{num_further / seconds:.1f} tokens/s")
        return parts

    def _count(self, num_tokens: int) -> None:
        """The rate counts from the first tokens on: what is read before them takes its own time."""
        now = time.monotonic()
        if not self._num_tokens:
            self._first = now
        if now - self._first < _AT_ONCE:
            self._num_first += num_tokens
        self._num_tokens += num_tokens

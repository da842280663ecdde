"""A file of JSON lines that a long run appends to and, started again, goes on from."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from specguard.core.errors import SpecguardError
from specguard.files import cannot_write


class Journal:
    """The rows of one run, each on the disk before the next is worked out.

    The first line holds the run's settings, if it has any. A last line that a killed process left
    unfinished is cut off. A context manager: while it is open, no second run writes to the file.
    Closed without a row, it leaves nothing behind.

    Raises:
        SpecguardError: the file is of a run with other settings, a line of it is no JSON, another
            run has it open, or it cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any] | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._is_empty = False  # a file that has got no row yet, and none from before
        self._path = path
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise SpecguardError(
                f"another run is writing to {path}", "wait for it, or name another output"
            ) from error
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            lines = read_lines(path) if path.exists() else []
            self._is_empty = not lines
            if settings is not None:
                _check_settings(path, lines, settings)
            self.rows = lines if settings is None else lines[1:]
            _cut_unfinished(path)
            if self._is_empty and settings is not None:
                self._write(settings)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other runs write; neither a lock nor a file without rows stays."""
        if not self._lock.is_locked:
            return
        if self._is_empty:
            self._path.unlink(missing_ok=True)
        with suppress(OSError):  # Windows keeps a file that is open
            Path(self._lock.lock_file).unlink()
        self._lock.release()

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; it is on the disk when this returns."""
        self._write(row)
        self._is_empty = False
        self.rows.append(row)

    def _write(self, row: dict[str, Any]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SpecguardError(
                f"{self._path} cannot be written: {error.strerror}",
                "what is in it is kept: the same command goes on from there",
            ) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Settings and rows of a run, without a line that was left unfinished.

    Raises:
        SpecguardError: a line is no JSON object.
    """
    return list(_lines(path))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    data = path.read_bytes()
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SpecguardError(f"line {number} of {path} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise SpecguardError(f"line {number} of {path} is no JSON object")
        yield row


def _cut_unfinished(path: Path) -> None:
    if path.exists():
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            with path.open("r+b") as file:
                file.truncate(end)


def _check_settings(path: Path, lines: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    settings = json.loads(json.dumps(settings))
    if lines and lines[0] != settings:
        raise SpecguardError(
            f"{path} is of another run: {_difference(lines[0], settings)}",
            "give the settings of that run; or, to start anew, name another output or remove "
            "that file",
        )


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in dict.fromkeys((*old, *new))
        if old.get(key) != new.get(key)
    )

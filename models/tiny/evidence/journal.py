"""A file of JSON lines that a long run appends to and, started again, goes on from."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specguard.core.errors import SpecguardError


class Journal:
    """Lines of one run; the first holds its settings.

    A last line that a killed process left unfinished is cut off.

    Raises:
        SpecguardError: the file is of a run with other settings, or a line of it is no JSON.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        settings = json.loads(json.dumps(settings))
        lines = list(_lines(path)) if path.exists() else []
        if lines and lines[0] != settings:
            raise SpecguardError(
                f"{path} is of a run with other settings: {lines[0]}, not {settings}",
                "give another --output",
            )
        self.rows: list[dict[str, Any]] = lines[1:]
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(settings)

    def append(self, row: dict[str, Any]) -> None:
        """Add a line; it is on the disk when this returns."""
        self._write(row)
        self.rows.append(row)

    def _write(self, row: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a run without its settings."""
    return list(_lines(path))[1:]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)
    for number, line in enumerate(data[:end].splitlines(), 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise SpecguardError(f"line {number} of {path} is no JSON: {error}") from error

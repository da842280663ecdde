"""Rows of JSONL files of anybody's, with the place of each for messages."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specguard.core.errors import SpecguardError
from specguard.files import check_input_file

_MAX_LINE = 1 << 24  # bytes of a line
_BLANK = b" \t\r\n\xef\xbb\xbf"


def read_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Rows with their places, read as they are asked for; blank lines are none.

    Raises:
        SpecguardError: the file cannot be read, or a line is no JSON; it is named.
    """
    return ((place, _row(line, place)) for place, line in read_lines(file))


def read_lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """Lines that are not blank, with their places.

    Raises:
        SpecguardError: the file cannot be read, or a line is too long.
    """
    check_input_file(file)
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(_MAX_LINE), b""), 1):
                place = f"line {number} of {file}"
                if len(line) == _MAX_LINE:
                    raise SpecguardError(f"{place} is longer than {_MAX_LINE} bytes")
                if line.strip(_BLANK):
                    yield place, line
    except OSError as error:
        raise SpecguardError(f"{file} cannot be read: {error.strerror}") from error


def text_from(value: Any) -> str:
    """A field that has to be text.

    Raises:
        TypeError: it is none, or holds what is no character.
    """
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is no text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can say \\ud800, which stands for no character
        raise TypeError(f"{value!r:.60} is no valid Unicode") from error
    return value


def decode_line(line: bytes, place: str) -> str:
    """A line's text.

    Raises:
        SpecguardError: it is not UTF-8.
    """
    try:
        return line.decode("utf-8-sig")  # a mark may stand before the first line
    except UnicodeDecodeError as error:
        raise SpecguardError(f"{place} is not UTF-8: {error.reason}") from error


def _row(line: bytes, place: str) -> Any:
    text = decode_line(line, place)
    try:
        return json.loads(text)
    except RecursionError as error:
        raise SpecguardError(f"{place} is nested too deeply") from error
    except ValueError as error:
        raise SpecguardError(f"{place} is no JSON: {error}") from error

"""JSONL files that survive kills. Knows nothing of what the records say, and needs no package."""

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Lines:
    """A file of JSON objects, one a line; a half-written last line is cut off when it is opened."""

    def __init__(self, path: Path) -> None:
        if path.exists():
            data = path.read_bytes()
            with path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)
        self.records = read_lines(path)
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: Record) -> None:
        """Write a record at once."""
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        self.records.append(record)

    def close(self) -> None:
        """No more records."""
        self._file.close()


def read_lines(path: Path) -> list[Record]:
    """The whole lines of a file that may still be written to; none where there is no file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    return [json.loads(line) for line in lines]

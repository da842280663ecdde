"""Bad input: files, folders and checkpoints of every kind that a command may be pointed at."""

import json
import os
import shutil
import socket
from pathlib import Path

from specguard import models

PROBLEM = "Mia has 24 shells. Mia sells half of the shells. How many shells does Mia have?"
_TINY = Path(models.__file__).parent / "tiny"
_OPEN, _CLOSED = 0o700, 0o500


class Material:
    """A folder of good files to be spoilt and of places that cannot be used, laid out once.

    ``solution`` is what ``specguard solve --json --detail`` printed.
    """

    def __init__(self, folder: Path, solution: bytes) -> None:
        self.folder = folder
        self._files: dict[Path, bytes] = {
            folder / role / file.name: file.read_bytes()
            for role in ("draft", "target")
            for file in (_TINY / role).iterdir()
        }
        rows = [{"problem": PROBLEM, "answer": "12", "id": number} for number in range(3)]
        for name, content in {
            "problems.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
            "problems.txt": PROBLEM.encode(),
            "solution.json": solution,
            "keys": b"secret\n",
            "empty": b"",
            "noise": bytes(range(256)) * 16,
            "model.gguf": b"GGUF\3\0\0\0" + b"\xff" * 64,
            "nested.json": b"[" * 100_000,
            "surrogate.jsonl": b'{"problem": "\\ud800", "answer": "1"}\n',
            "huge.jsonl": b'{"problem": "' + b"x" * 2_000_000 + b'", "answer": 1e999}\n',
            "secret.txt": PROBLEM.encode(),
        }.items():
            self._files[folder / name] = content
        self._written: dict[Path, int] = {}
        self.restore()

    def restore(self) -> None:
        """Everything as it was laid out, whatever a command has done since."""
        for path in self.folder.iterdir():
            if path not in self._files and path.name not in ("draft", "target"):
                _remove(path)
        for path, content in self._files.items():
            if not _is_unchanged(path, self._written.get(path)):
                path.parent.mkdir(exist_ok=True)
                _remove(path)
                path.write_bytes(content)
                if path.name == "secret.txt":
                    path.chmod(0)
                self._written[path] = path.stat().st_mtime_ns
        for name in "results", "closed":
            (self.folder / name).mkdir()
        (self.folder / "closed").chmod(_CLOSED)
        for name, there in LINKS.items():
            (self.folder / name).symlink_to(there)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(self.folder / "socket"))

    def spoil(self, name: str, content: bytes) -> None:
        """Another content for one of the files."""
        (self.folder / name).write_bytes(content)

    def content(self, name: str) -> bytes:
        """What `SPOILABLE` holds."""
        return self._files[self.folder / name]

    def partial_files(self) -> list[Path]:
        """Files that something was to be written to and moved from."""
        return [path for path in self.folder.rglob(".specguard.*") if path.is_file()]


def _is_unchanged(path: Path, written: int | None) -> bool:
    try:
        return path.lstat().st_mtime_ns == written
    except OSError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.chmod(_OPEN)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


LINKS = {"broken-link": "nowhere", "loop": "loop", "full": "/dev/full", "null": "/dev/null"}
PLACES = (
    *("draft", "target", "problems.jsonl", "problems.txt", "solution.json", "keys", "empty"),
    *("noise", "model.gguf", "nested.json", "surrogate.jsonl", "huge.jsonl", "results", "closed"),
    *("closed/new", "secret.txt", "broken-link", "loop", "full", "null", "socket", "new"),
    *("new/new", "x" * 300, ".", "", "/", "/dev/full", "/dev/zero", "/proc/self/mem", "~", "-"),
    *("a\nb", "\udcff", "draft/config.json", "draft/model.safetensors", "owner/name", "a/b/c"),
    *(
        "http://127.0.0.1:9",
        "https://127.0.0.1:9/v1",
        "http://u:p@127.0.0.1:9",
        "http://",
        "ftp://x",
    ),
)
# What may be spoilt before a command reads it.
SPOILABLE = (
    *("draft/config.json", "draft/generation_config.json", "draft/tokenizer.json"),
    *("draft/tokenizer_config.json", "draft/chat_template.jinja", "draft/model.safetensors"),
    *("target/config.json", "target/tokenizer.json", "target/model.safetensors"),
    *("problems.jsonl", "problems.txt", "solution.json", "keys"),
)

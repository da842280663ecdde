"""A model hub on this machine: what ``specguard models pull`` asks of the real one, slowly.

It serves the built-in pair under two names, a few kilobytes at a time, so that a download can be
interrupted at any moment.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from specguard import models

COMMIT = "c" * 40
_TINY = Path(models.__file__).parent / "tiny"
REPOS = {f"tiny/{role}": _TINY / role for role in ("draft", "target")}
_PIECE, _NAP = 1 << 16, 0.005  # bytes, and seconds between two pieces


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        about = re.fullmatch(r"/api/models/(\w+/\w+)(/revision/\w+)?(\?.*)?", self.path)
        tree = re.fullmatch(r"/api/models/(\w+/\w+)/tree/\w+.*", self.path)
        file = re.fullmatch(r"/(\w+/\w+)/resolve/\w+/([\w.]+)", self.path)
        if about and about[1] in REPOS:
            names = [{"rfilename": name} for name in _names(about[1])]
            self._send(json.dumps({"id": about[1], "sha": COMMIT, "siblings": names}).encode())
        elif tree and tree[1] in REPOS:
            files = [
                {
                    "type": "file",
                    "path": name,
                    "size": (REPOS[tree[1]] / name).stat().st_size,
                    "oid": COMMIT,
                }
                for name in _names(tree[1])
            ]
            self._send(json.dumps(files).encode())
        elif file and file[1] in REPOS and file[2] in _names(file[1]):
            self._send((REPOS[file[1]] / file[2]).read_bytes(), with_body, is_file=True)
        else:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, content: bytes, with_body: bool = True, is_file: bool = False) -> None:
        tag = hashlib.sha256(content).hexdigest()
        part = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(part[1]) if part and is_file else 0
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if is_file:
            self.send_header("ETag", f'"{tag}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        if not with_body:
            return
        try:
            for start in range(first, len(content), _PIECE):
                self.wfile.write(content[start : start + _PIECE])
                time.sleep(_NAP)
        except OSError:  # the client has been killed
            self.close_connection = True


def _names(repo: str) -> list[str]:
    return sorted(path.name for path in REPOS[repo].iterdir() if path.is_file())


@contextmanager
def hub() -> Iterator[str]:
    """Serve until the block is left; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()

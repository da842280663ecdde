"""A server that answers as a real one did, or goes wrong as one is told to.

To record what a real one answers, as files of requests and answers::

    python -m tests.replay URL FILE --port 18080
"""

import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Answer = tuple[int, str, str]  # status, kind of content, content


def key(method: str, path: str, body: Any) -> str:
    """A request, written in one way; seeds and names of models are nobody's business."""
    if isinstance(body, dict):
        body = {name: body[name] for name in sorted(body) if name not in ("seed", "model")}
    return f"{method} {path} {json.dumps(body, separators=(',', ':'))}"


@dataclass
class Replay:
    """What is answered to which request; ``fault`` may answer instead, or do worse."""

    answers: dict[str, Answer]
    fault: Callable[[BaseHTTPRequestHandler, str], bool] = lambda handler, request: False
    upstream: str | None = None
    requests: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def read(cls, *files: Path) -> "Replay":
        answers: dict[str, Answer] = {}
        for file in files:
            answers |= {name: tuple(each) for name, each in json.loads(file.read_text()).items()}
        return cls(answers)

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        size = int(handler.headers.get("Content-Length") or 0)
        body = json.loads(handler.rfile.read(size)) if size else None
        request = key(handler.command, handler.path, body)
        self.requests.append(request)
        self.headers.append(dict(handler.headers))
        if self.fault(handler, request):
            return
        if self.upstream is not None and request not in self.answers:
            self.answers[request] = self._ask(handler, body)
        status, kind, content = self.answers.get(
            request, (404, "application/json", f'{{"message": "not recorded: {handler.path}"}}')
        )
        send(handler, status, kind, content)

    def _ask(self, handler: BaseHTTPRequestHandler, body: Any) -> Answer:
        request = urllib.request.Request(
            f"{self.upstream}{handler.path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
            method=handler.command,
        )
        try:
            answer = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            answer = error
        return answer.status, answer.headers["Content-Type"], answer.read().decode()


def send(handler: BaseHTTPRequestHandler, status: int, kind: str, content: str) -> None:
    """A whole answer."""
    data = content.encode()
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


@contextmanager
def serving(replay: Replay, port: int = 0) -> Iterator[str]:
    """The server's URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            replay.handle(self)

        def do_POST(self) -> None:
            replay.handle(self)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # whoever has asked may be gone

    server = Server(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    """Pass requests on and keep the answers until interrupted."""
    upstream, file, port = sys.argv[1], Path(sys.argv[2]), int(sys.argv[4])
    replay = Replay({}, upstream=upstream)
    with serving(replay, port):
        try:
            while True:
                time.sleep(0.2)
                file.write_text(json.dumps(replay.answers, indent=0, sort_keys=True))
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()

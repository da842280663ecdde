"""A server in a process of its own, and a client that costs little beside it.

`load` and `soak` are built on this. The client knows as much HTTP as they need.
"""

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

import psutil

from specguard import SpecguardError
from specguard.models.tiny import problems
from specguard.models.tiny.grammar import check

# For --draft-cost: so that all runs decide alike, whatever else the machine does.
DRAFT_COST = "0.5,0.05,3"
_LISTENING = re.compile(r"Listening at (\S+)/v1")


@dataclass(frozen=True, slots=True)
class Server:
    """Where it is, and its process."""

    url: str
    process: "subprocess.Popen[str]"

    def memory(self) -> int:
        """Resident bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)


@dataclass(slots=True)
class Reply:
    """What came back, and when; ``chunks`` are those of a stream, or the whole answer alone."""

    status: int
    chunks: list[dict[str, Any]]
    seconds: float
    first_seconds: float | None = None

    @property
    def text(self) -> str:
        """What the model says."""
        choices = [choice for chunk in self.chunks for choice in chunk.get("choices", ())]
        parts = [choice.get("delta") or choice.get("message") or {} for choice in choices]
        return "".join(part.get("content") or "" for part in parts)


@contextmanager
def started(
    arguments: Sequence[str], models: Sequence[str] = ("--models", "tiny")
) -> Iterator[Server]:
    """A server on a free port, until the block is left; of the built-in pair unless told otherwise.

    Raises:
        SpecguardError: it does not start.
    """
    command = [sys.executable, "-m", "specguard", "serve", *models, "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    reading = threading.Thread(target=lambda: list(process.stderr or ()), daemon=True)
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if match := _LISTENING.search(line):
                break
        else:
            raise SpecguardError(f"the server did not start: {''.join(said)}")
        # Its log is read on: a full pipe would hold it up.
        reading.start()
        yield Server(match.group(1), process)
    finally:
        process.terminate()
        process.wait()
        if reading.ident is not None:
            reading.join()
        process.stderr.close()


def fitting() -> Iterator[problems.Problem]:
    """Problems that the built-in pair was made for."""
    for problem in problems.stream(problems.CALIBRATION):
        try:
            check(problem.text)
        except SpecguardError:
            continue
        yield problem


def texts(count: int) -> list[str]:
    """Texts of such problems."""
    return [problem.text for problem in islice(fitting(), count)]


def body(problem: str, stream: bool = True, **own: Any) -> dict[str, Any]:
    """A request."""
    messages = [{"role": "user", "content": problem}]
    return {"model": "tiny", "messages": messages, "stream": stream, "specguard": own}


async def ask(
    url: str,
    asked: Mapping[str, Any] | bytes,
    path: str = "/v1/chat/completions",
    cut_after: int | None = None,
) -> Reply:
    """Ask, and read what comes; hang up after so many chunks where ``cut_after`` is given."""
    where, started_at = urlsplit(url), time.perf_counter()
    content = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
    reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=2**24)
    head = f"POST {path} HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    try:
        writer.write(head.encode() + content)
        await writer.drain()
        if cut_after == 0:
            return Reply(0, [], time.perf_counter() - started_at)
        answer_head = (await reader.readuntil(b"\r\n\r\n")).decode()
        reply = Reply(int(answer_head.split()[1]), [], 0.0)
        is_stream = "text/event-stream" in answer_head
        async for chunk in _chunks(reader, is_stream):
            reply.chunks.append(chunk)
            if reply.first_seconds is None and reply.text:
                reply.first_seconds = time.perf_counter() - started_at
            if cut_after is not None and len(reply.chunks) >= cut_after:
                break
        reply.seconds = time.perf_counter() - started_at
        return reply
    finally:
        writer.close()


async def _chunks(reader: asyncio.StreamReader, is_stream: bool) -> AsyncGenerator[dict[str, Any]]:
    if not is_stream:
        yield json.loads(await reader.read())
        return
    async for line in reader:  # between them: lengths of HTTP's own chunks, and blank lines
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))
        elif line.startswith(b"data: [DONE]"):
            return

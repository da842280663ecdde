"""JSON over HTTP to one server: time limits, retries, and errors of one line.

All requests of this process go through one thread with an event loop of its own, so that whatever
loop asks shares the connections. A cancelled request closes its connection, by which servers know.
"""

import asyncio
import json
import os
import random
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from specguard.core.errors import SpecguardError, UsageError

API_KEY = "SPECGUARD_API_KEY"
SECONDS = 600.0  # for an answer; a step on a slow machine takes its time
_CONNECT_SECONDS = 10.0
_MOST_BYTES = 2**28  # of an answer
_MOST_CONNECTIONS = 512
_ATTEMPTS = 6
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 8.0  # seconds before asking again
_BUSY = (429, 502, 503, 504)
_CLOSING_SECONDS = 2.0
_THREAD = "specguard-http"
_WORDS = 200  # characters of what a server says that are repeated

T = TypeVar("T")


def base_url(source: str) -> str:
    """A server's URL without what clients of OpenAI's protocol put behind it.

    Raises:
        UsageError: it holds a password, or more than an address and a path.
    """
    try:
        parts = urlsplit(source)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"no server's URL: {error}") from error
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            "a URL with a user or a password in it is refused: it would end up in records",
            f"put the key into the environment variable {API_KEY}",
        )
    if not host or parts.query or parts.fragment:
        raise UsageError(f"no server's URL: {source!r}", "for example http://localhost:8000")
    return source.rstrip("/").removesuffix("/v1").rstrip("/")


class Client:
    """One server.

    Raises:
        UsageError: the URL is none, or holds a password.
    """

    def __init__(self, url: str) -> None:
        self.url = base_url(url)
        key = os.environ.get(API_KEY)
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(SECONDS, connect=_CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=_MOST_CONNECTIONS),
        )
        weakref.finalize(self, _close, self._http)

    async def stream(
        self, path: str, body: Callable[[], Mapping[str, Any]], take: Callable[[Any], bool]
    ) -> None:
        """Hand events on as they come, until ``take`` says that this is enough.

        Where the connection breaks, ``body`` is asked for what is wanted now.
        """
        num_heard = [0]  # since it was last asked

        def counted(event: Any) -> bool:
            num_heard[0] += 1
            return take(event)

        def hear() -> Coroutine[Any, Any, None]:
            num_heard[0] = 0
            return self._hear(path, body(), counted)

        await _in_thread(self._retried(hear, has_moved=lambda: num_heard[0] > 0))

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer to a request.

        Raises:
            SpecguardError: there is no server, it refuses, or says what is no JSON.
        """
        return await _in_thread(self._ask("POST", path, body))

    def ask_now(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The same for who has no event loop: what is there, or the answer to a body."""
        method = "GET" if body is None else "POST"
        work = self._ask(method, path, body, is_patient=False)
        return asyncio.run_coroutine_threadsafe(work, _loop()).result()

    async def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None, is_patient: bool = True
    ) -> Any:
        async def ask() -> Any:
            async with self._http.stream(method, self.url + path, json=body) as answer:
                content = await self._read(answer)
            return self._json(answer, content)

        return await self._retried(ask, _ATTEMPTS if is_patient else 1)

    async def _hear(self, path: str, body: Mapping[str, Any], take: Callable[[Any], bool]) -> None:
        async with self._http.stream("POST", self.url + path, json=body) as answer:
            if answer.status_code != 200:
                self._json(answer, await self._read(answer))
            async for line in answer.aiter_lines():
                _, mark, data = line.partition("data: ")
                if not mark or data == "[DONE]":
                    continue
                event = self._parsed(answer, data)
                if isinstance(event, dict) and "error" in event:
                    raise SpecguardError(f"{self.url} gives up: {_message(event)}")
                if take(event):
                    return

    async def _retried(
        self,
        work: Callable[[], Coroutine[Any, Any, T]],
        num_attempts: int = _ATTEMPTS,
        has_moved: Callable[[], bool] = lambda: False,
    ) -> T:
        """What comes of it, tried again where the connection breaks or the server is busy.

        Attempts that have moved on do not count.
        """
        attempt = 0
        while True:
            attempt = 1 if has_moved() else attempt + 1
            pause = min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1)
            try:
                return await work()
            except _Busy as error:
                if attempt == num_attempts:
                    raise error.message from None
                pause = max(pause, error.seconds)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                is_broken = isinstance(
                    error, httpx.ConnectTimeout | httpx.NetworkError | httpx.RemoteProtocolError
                )
                if attempt == num_attempts or not is_broken:
                    raise self._unreachable(error) from error
            await asyncio.sleep(pause)

    async def _read(self, answer: httpx.Response) -> bytes:
        content = bytearray()
        async for part in answer.aiter_bytes():
            content += part
            if len(content) > _MOST_BYTES:
                raise SpecguardError(f"{self.url} answers without end: {len(content)} bytes so far")
        return bytes(content)

    def _unreachable(self, error: Exception) -> SpecguardError:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if "CERTIFICATE" in reason.upper() or "SSL" in reason.upper():
            hint = (
                "its certificate has to be one that this machine trusts: SSL_CERT_FILE names more"
            )
        else:
            hint = "is the server running, and is this its address and port?"
        return SpecguardError(f"no answer from {self.url}: {reason[:_WORDS]}", hint)

    def _json(self, answer: httpx.Response, content: bytes) -> Any:
        status = answer.status_code
        if status in (401, 403):
            raise SpecguardError(
                f"{self.url} wants an API key, or another one ({status})",
                f"put it into the environment variable {API_KEY}",
            )
        if status in _BUSY:
            words = " ".join(content.decode(errors="replace").split())[:_WORDS]
            message = SpecguardError(f"{self.url} is busy or has gone ({status}): {words}")
            raise _Busy(message, _seconds(answer.headers.get("Retry-After")))
        said = self._parsed(answer, content)
        if status != 200:
            raise SpecguardError(f"{self.url} refuses ({status}): {_message(said)}")
        return said

    def _parsed(self, answer: httpx.Response, content: bytes | str) -> Any:
        try:
            return json.loads(content)
        except ValueError as error:
            kind = answer.headers.get("content-type", "something").split(";")[0]
            raise SpecguardError(
                f"{self.url} answers with {kind} that is no JSON ({answer.status_code})",
                "is this the address of an inference server?",
            ) from error


class _Busy(Exception):  # noqa: N818 - no error yet
    """A server that may answer later."""

    def __init__(self, message: SpecguardError, seconds: float) -> None:
        super().__init__(message)
        self.message, self.seconds = message, seconds


def _message(said: Any) -> str:
    """What a server gives as its reason."""
    for name in ("error", "message", "detail"):
        if isinstance(said, dict) and name in said:
            said = said[name]
    return " ".join(str(said).split())[:_WORDS]


def _seconds(retry_after: str | None) -> float:
    try:
        return min(float(retry_after or 0), 60.0)
    except ValueError:  # a date
        return 0.0


def _close(http: httpx.AsyncClient) -> None:
    """Close its connections, in the thread that has them."""
    closed = asyncio.run_coroutine_threadsafe(http.aclose(), _loop())
    if threading.current_thread().name != _THREAD:
        with suppress(TimeoutError):
            closed.result(_CLOSING_SECONDS)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=_THREAD, daemon=True).start()
    return loop


async def _in_thread(work: Coroutine[Any, Any, T]) -> T:
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, _loop()))

"""What every request has to pass before anything reads it: host, key, size. Logs what became of it.

Knows ASGI and nothing of what is served.
"""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Collection, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specguard.serve.errors import ApiError, internal_error
from specguard.serve.limits import Limits
from specguard.serve.metrics import Metrics

_log = logging.getLogger(__name__)
_OPEN = ("/", "/health")  # nothing that a key protects
_KNOWN = (*_OPEN, "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions")
_STATUS = "status"


class Guard:
    """Wraps the application.

    Args:
        app: what answers.
        keys: of which a request needs one; none: it needs none.
        hosts: names by which the server may be asked for; None: any. A page on the web that
            claims a name for this machine's address could use a server without keys otherwise.
        limits: of bodies.
        metrics: where requests are counted.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        hosts: Collection[str] | None,
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        self._app, self._keys, self._hosts = app, [key.encode() for key in keys], hosts
        self._limits, self._metrics = limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # a client that has hung up

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message[_STATUS]
            await send(message)

        try:
            try:
                self._check(scope)
                await self._app(scope, await self._whole(scope, receive), note)
            except ApiError as error:
                await _answer(error, note)
            except Exception:
                _log.exception("a request has failed")
                if status == 499:
                    await _answer(internal_error(), note)
        finally:
            path = scope["path"]
            self._metrics.request(path if path in _KNOWN else "other", status)
            seconds = time.perf_counter() - started
            # As JSON: a path may hold anything.
            _log.info("%s %s %d %.3fs", scope["method"], json.dumps(path), status, seconds)

    def _check(self, scope: Scope) -> None:
        headers = _headers(scope)
        if self._hosts is not None:
            host = _name_of(headers.get("host", ""))
            if host not in self._hosts:
                raise ApiError(403, "this server is not asked for by that name", code="host")
        if not self._keys or scope["path"] in _OPEN or scope["method"] == "OPTIONS":
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode()
        known = [hmac.compare_digest(given, each) for each in self._keys]
        if scheme.lower() != "bearer" or not any(known):
            raise ApiError(
                401,
                "a valid API key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _whole(self, scope: Scope, receive: Receive) -> Receive:
        """What gives the body, once all of it is there."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        headers = _headers(scope)
        # A page on the web may send other types anywhere without being asked.
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise ApiError(415, "the body must be application/json")
        most = self._limits.body_bytes
        parts: list[bytes] = []
        told = headers.get("content-length", "")
        size, num_bytes = int(told) if told.isdecimal() else 0, 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                is_more = size <= most
                while is_more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return _giving(message)
                    parts.append(message.get("body", b""))
                    num_bytes += len(parts[-1])
                    is_more = message.get("more_body", False) and num_bytes <= most
        except TimeoutError:
            raise ApiError(408, "the body did not come", headers={"Connection": "close"}) from None
        if max(size, num_bytes) > most:
            raise ApiError(
                413,
                f"the body has more than {most} bytes",
                code="request_too_large",
                headers={"Connection": "close"},
            )
        return _giving({"type": "http.request", "body": b"".join(parts)}, receive)


def _giving(first: Message, receive: Receive | None = None) -> Receive:
    given = [first]

    async def give() -> Message:
        if given:
            return given.pop()
        return first if receive is None else await receive()

    return give


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _name_of(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def _answer(error: ApiError, send: Send) -> None:
    headers: MutableMapping[str, str] = {"Content-Type": "application/json", **error.headers}
    start: dict[str, Any] = {
        "type": "http.response.start",
        _STATUS: error.status,
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    await send(start)
    await send({"type": "http.response.body", "body": json.dumps(error.body).encode()})

"""A server in this process for the tests, with scripted engines or the built-in pair behind it."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from starlette.testclient import TestClient

import specguard
from specguard.core import Solver
from specguard.serve.app import guarded
from specguard.serve.limits import Limits
from specguard.serve.metrics import Metrics
from specguard.serve.service import Service
from specguard.serve.worker import Worker

PROBLEM = "Mia has 24 shells. Mia finds 9 more shells. How many shells does Mia have?"


@cache
def tiny() -> Solver:
    return specguard.load("tiny", backend="cpu", draft_cost=None)


@dataclass
class Served:
    """A client of a server, and what is behind it."""

    client: TestClient
    worker: Worker
    solver: Solver

    def chat(self, content: str = PROBLEM, **more: Any) -> Any:
        """The response to a request with one message, unless others are given."""
        messages = [{"role": "user", "content": content}]
        body = {"model": "m", "messages": messages, **more}
        return self.client.post("/v1/chat/completions", json=body)

    def answer(self, content: str = PROBLEM, **more: Any) -> dict[str, Any]:
        """What is answered, where all is well."""
        response = self.chat(content, **more)
        assert response.status_code == 200, response.text
        return response.json()  # type: ignore[no-any-return]

    def refusal(self, content: str = PROBLEM, *, status: int = 400, **more: Any) -> str:
        """Why a request is refused."""
        return refusal_of(self.chat(content, **more), status)

    def chunks(self, content: str = PROBLEM, **more: Any) -> list[dict[str, Any]]:
        """The chunks of a stream."""
        return chunks_of(self.chat(content, stream=True, **more))


def refusal_of(response: Any, status: int = 400) -> str:
    """The message of an error, which is in the protocol's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return str(error["message"])


def chunks_of(response: Any) -> list[dict[str, Any]]:
    """The chunks of a stream that came to its end."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, last = response.text.strip().split("\n\n")
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def text_of(chunks: list[dict[str, Any]], number: int = 0) -> str:
    """What the chunks of one choice say together."""
    return "".join(
        choice["delta"].get("content", "")
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == number
    )


@contextmanager
def serving(
    solver: Solver,
    *,
    limits: Mapping[str, Any] | None = None,
    check: Callable[[str], None] | None = None,
    is_forced: bool = False,
    logs_prompts: bool = False,
    headers: Mapping[str, str] | None = None,
    **guard: Any,
) -> Iterator[Served]:
    """A server whose model is called "m"."""
    metrics, most = Metrics(), Limits(**(limits or {}))
    with Worker(solver, most, metrics) as worker:
        service = Service(solver, worker, most, "m", check, is_forced, logs_prompts)
        app = guarded(service, metrics, **guard)
        with TestClient(app, headers=dict(headers or {})) as client:
            yield Served(client, worker, solver)

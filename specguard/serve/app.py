"""The application: which path answers what."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from specguard import __version__
from specguard.serve.answers import (
    Answer,
    encoded,
    event,
    finish_reason,
    record,
    step_record,
    tool_calls,
)
from specguard.serve.errors import ApiError, internal_error
from specguard.serve.guard import Guard
from specguard.serve.metrics import Metrics
from specguard.serve.page import HEADERS, render
from specguard.serve.schema import ChatRequest, CompletionRequest
from specguard.serve.schema import Request as Asked
from specguard.serve.service import Service
from specguard.serve.worker import Event, Flight, Outcome, Piece

T = TypeVar("T")


def guarded(
    service: Service,
    metrics: Metrics,
    *,
    keys: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
    origins: Sequence[str] = (),
) -> ASGIApp:
    """The application behind its guard; pages of other ``origins`` may use it, too."""
    app: ASGIApp = Guard(create_app(service, metrics), keys, hosts, service.limits, metrics)
    if origins:
        app = CORSMiddleware(
            app,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def create_app(service: Service, metrics: Metrics) -> FastAPI:
    """The application of a service, without a guard."""
    app = FastAPI(title="SpecGuard", version=__version__, docs_url=None, redoc_url=None)
    began = int(time.time())

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_values(request: Request, error: RequestValidationError) -> JSONResponse:
        return await refuse(request, _invalid(error))

    @app.exception_handler(HTTPException)
    async def refuse_otherwise(request: Request, error: HTTPException) -> JSONResponse:
        headers = error.headers
        return await refuse(request, ApiError(error.status_code, error.detail, headers=headers))

    @app.exception_handler(Exception)
    async def fail(request: Request, _: Exception) -> JSONResponse:
        return await refuse(request, internal_error())  # the guard logs what it was

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        is_checked = service.check is not None and not service.is_forced
        return HTMLResponse(render(service.name, is_checked), headers=HEADERS)

    @app.get("/health")
    async def health() -> dict[str, str]:
        service.worker.check()
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service.name, began)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise ApiError(404, "there is no such model", param="model", code="model_not_found")
        return _model(service.name, began)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return await _respond(service, asked, request)

    @app.post("/v1/completions", response_model=None)
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        return await _respond(service, asked, request)

    return app


def _model(name: str, began: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": began, "owned_by": "specguard"}


def _invalid(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        message = f"{param} is not supported by this server"
    else:
        message = f"{param}: {first['msg']}" if param else str(first["msg"])
    if len(message) > 300:
        message = f"{message[:300]}..."
    shown = None if param is None else param.encode(errors="backslashreplace").decode()[:100]
    return ApiError(400, message, param=shown)


async def _respond(service: Service, asked: Asked, request: Request) -> Response:
    flight, num_prompts = await service.begin(asked)
    answer = Answer(service.name, isinstance(asked, ChatRequest))
    if not asked.stream:
        outcomes = await _unless_gone(request, flight, _outcomes(flight))
        return Response(encoded(answer.whole(outcomes, num_prompts)), media_type="application/json")
    events = flight.events()
    # Before anything is sent, an error still has a status of its own.
    first = await _unless_gone(request, flight, anext(events))
    chunks = _together(_chunks(first, events, answer, asked, num_prompts), flight)
    return StreamingResponse(
        chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


async def _unless_gone(request: Request, flight: Flight, work: Awaitable[T]) -> T:
    """What comes of it, unless the client hangs up first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has hung up")
        return task.result()
    except BaseException:
        flight.cancel()
        raise
    finally:
        task.cancel()
        gone.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _outcomes(flight: Flight) -> list[Outcome]:
    outcomes: dict[int, Outcome] = {}
    async with aclosing(flight.events()) as events:
        async for number, happened in events:
            if isinstance(happened, Outcome):
                outcomes[number] = happened
    return [outcomes[number] for number in sorted(outcomes)]


async def _chunks(
    first: tuple[int, Event],
    events: AsyncGenerator[tuple[int, Event]],
    answer: Answer,
    asked: Asked,
    num_prompts: int,
) -> AsyncGenerator[bytes]:
    """The stream of an answer, in the form of server-sent events."""
    is_chat = isinstance(asked, ChatRequest)
    has_usage = asked.stream_options is not None and asked.stream_options.include_usage
    more = {"usage": None} if has_usage else {}
    outcomes: dict[int, Outcome] = {}
    begun: set[int] = set()
    try:
        async with aclosing(events):
            async for number, happened in _with_first(first, events):
                if is_chat and number not in begun:
                    begun.add(number)
                    yield event(answer.chunk(number, {"role": "assistant", "content": ""}, **more))
                for delta, reason, own in _deltas(happened, is_chat, asked):
                    yield event(answer.chunk(number, delta, reason, own, **more))
                if isinstance(happened, Outcome):
                    outcomes[number] = happened
        if has_usage:
            whole = [outcomes[number] for number in sorted(outcomes)]
            yield event(answer.usage_chunk(whole, num_prompts))
    except ApiError as error:
        yield event(error.body)
    yield event("[DONE]")


async def _together(chunks: AsyncGenerator[bytes], flight: Flight) -> AsyncGenerator[bytes]:
    """What is there at the same time is sent at once: a write costs more than a chunk."""
    held = b""
    async with aclosing(chunks):
        async for chunk in chunks:
            held += chunk
            if not flight.has_more:
                yield held
                held = b""
    yield held


async def _with_first(
    first: tuple[int, Event], events: AsyncGenerator[tuple[int, Event]]
) -> AsyncGenerator[tuple[int, Event]]:
    yield first
    async for happened in events:
        yield happened


def _deltas(
    happened: Event, is_chat: bool, asked: Asked
) -> Iterator[tuple[dict[str, Any] | str, str | None, dict[str, Any] | None]]:
    """The chunks of one event: what they add, why the answer ends, and what we say of it."""

    def added(text: str) -> dict[str, Any] | str:
        return {"content": text} if is_chat else text

    if isinstance(happened, Piece):
        own, step, config = None, happened.step, happened.config
        if step is not None and config is not None and asked.specguard.stream_steps:
            own = {"step": step_record(step, config)}
        if happened.text or own:
            yield added(happened.text), None, own
        return
    assert isinstance(happened, Outcome)
    if happened.rest:
        yield added(happened.rest), None, None
    if happened.calls:
        yield {"tool_calls": tool_calls(happened.calls, is_delta=True)}, None, None
    yield {} if is_chat else "", finish_reason(happened), record(happened.solution)

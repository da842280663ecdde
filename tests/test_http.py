"""Engines behind servers: what real ones answered, and what goes wrong on the way."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

import specguard
from specguard.backends.http import client as client_module
from specguard.backends.http.backend import HTTP
from specguard.backends.http.client import API_KEY, Client, base_url
from specguard.backends.http.dialects import DIALECTS, Scored, Wanted
from specguard.core import (
    GREEDY,
    Boundary,
    Engine,
    GenerateJob,
    ScoreJob,
    SpecguardError,
    UsageError,
    VerifierConfig,
    solve_many,
)
from tests.conftest import TINY
from tests.replay import Replay, send, serving
from tests.serving import serving as behind
from tests.test_cli import invoke

RECORDED = Path(__file__).parent / "data" / "http"
SHELLS = "Mia has 24 shells. Mia finds 9 more shells. How many shells does Mia have?"
TOKENIZER = str(TINY / "target")
ANSWER = "33"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks again asks at once."""
    monkeypatch.setattr(client_module, "_FIRST_PAUSE", 0.0)
    monkeypatch.delenv(API_KEY, raising=False)


@pytest.fixture
def vllm() -> Iterator[tuple[Replay, str]]:
    replay = Replay.read(RECORDED / "vllm.json")
    with serving(replay) as url:
        yield replay, url


@pytest.fixture
def llama() -> Iterator[tuple[Replay, str]]:
    replay = Replay.read(RECORDED / "llamacpp.json")
    with serving(replay) as url:
        yield replay, url


def load(url: str, **arguments: str) -> Engine:
    backend: Any = HTTP.with_arguments({"tokenizer": TOKENIZER, **arguments})
    engine: Engine = backend.load(url, "auto", False, None)
    return engine


def solve(draft: str, target: str, **settings: Any) -> Any:
    arguments = {f"{role}.tokenizer": TOKENIZER for role in ("draft", "target")}
    given = {
        name: value
        for name, value in arguments.items()
        if (draft if name.startswith("draft") else target).startswith("http")
    }
    options = {
        "draft_cost": None,
        "system_prompt": "Please reason step by step, and put your final answer within \\boxed{}.",
        **settings,
    }
    return specguard.load(
        draft=draft, target=target, backend="cpu", engine_args=given, **options
    ).solve(SHELLS)


def test_a_draft_and_a_target_behind_servers(
    vllm: tuple[Replay, str], llama: tuple[Replay, str]
) -> None:
    found = solve(llama[1], vllm[1])
    assert found.answer == ANSWER
    assert [step.decision for step in found.steps] == ["accepted"] * 3
    assert not found.is_reproducible
    assert (found.draft, found.target) == (llama[1], vllm[1])
    # Of a step that is read in a stream nothing is read behind its end.
    texts = [step.text for step in found.steps]
    assert texts[0] == "Mia has 24 shells. Given.\n\n"


def test_a_local_draft_beside_a_server(vllm: tuple[Replay, str]) -> None:
    found = solve(str(TINY / "draft"), vllm[1])
    assert (found.answer, found.stats.num_accepted_steps) == (ANSWER, 3)


def test_a_server_that_scores_nothing_cannot_verify(llama: tuple[Replay, str]) -> None:
    draft = str(TINY / "draft")
    with pytest.raises(SpecguardError, match=r"has no scoring .*llama-server") as caught:
        solve(draft, llama[1])
    assert "--verifier draft" in caught.value.hint
    engine = load(llama[1])
    with pytest.raises(SpecguardError, match="cannot verify"):
        asyncio.run(engine.score(ScoreJob(key=0, prefix=(5,), continuations=((6,),))))
    own = solve(draft, llama[1], verifier=VerifierConfig(model="draft", weights={"log_prob": 1.0}))
    assert own.answer == ANSWER


def test_requests_of_each_kind_of_server_say_what_is_wanted() -> None:
    wanted = Wanted("m", [1, 2], 3, 9, "\n\n", [2], GREEDY, 7, False)
    for dialect in DIALECTS.values():
        body = json.dumps(dialect.generate_body(wanted))
        assert "[1, 2]" in body
        assert " 9" in body
    sglang = DIALECTS["sglang"]
    answer = {"meta_info": {"output_token_logprobs": [[-0.5, 11, None], [-0.25, 12, None]]}}
    [found] = sglang.continuations(answer)
    assert (found.token_ids, found.logprobs) == ([11, 12], [-0.5, -0.25])
    scored = {
        "meta_info": {
            "input_token_logprobs": [[None, 2, None], [-0.1, 11, None], [-3.0, 12, None]],
            "input_top_logprobs": [None, [[-0.1, 11, None]], [[-0.2, 40, None]]],
        },
        "output_ids": [41],
    }
    assert sglang.scored(scored, 2, [11, 12]) == Scored([-0.1, -3.0], [11, 40, 41])


# What goes wrong.

JOB = GenerateJob(
    key=0,
    prefix=(5,),
    sampling=GREEDY,
    boundary=Boundary("\n\n", frozenset({2}), 9),
)

Fault = Callable[[BaseHTTPRequestHandler, str], bool]


def answering(status: int, content: str, kind: str = "application/json") -> Fault:
    def fault(handler: BaseHTTPRequestHandler, request: str) -> bool:
        if "completion" in request:
            send(handler, status, kind, content)
            return True
        return False

    return fault


def drop(handler: BaseHTTPRequestHandler) -> None:
    """Break the connection."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def cut(handler: BaseHTTPRequestHandler, request: str) -> bool:
    """Promise more than is sent."""
    if "completion" not in request:
        return False
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True
    return True


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (answering(200, "<html>hello</html>", "text/html"), "text/html that is no JSON"),
        (answering(500, '{"error": {"message": "CUDA\\nerror"}}'), "refuses (500): CUDA error"),
        (answering(404, '{"detail": "Not Found"}'), "refuses (404): Not Found"),
        (answering(401, "{}"), "wants an API key"),
        (answering(503, "<b>loading</b>", "text/html"), "busy or has gone (503)"),
        (answering(200, '{"choices": []}'), "has drawn 0 of them"),
        (answering(200, '{"choices": [{"index": 0}]}'), "answers otherwise than its kind"),
        (answering(200, "[]"), "answers otherwise than its kind"),
        (cut, "no answer from"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_line(fault: Fault, message: str, vllm: tuple[Replay, str]) -> None:
    replay, url = vllm
    solver = specguard.load(
        target=url, method="target", engine_args={"target.tokenizer": TOKENIZER}
    )
    replay.fault = fault
    with pytest.raises(SpecguardError) as caught:
        solver.solve(SHELLS)
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    replay.fault = lambda handler, request: False  # it is back
    assert solver.solve(SHELLS).answer == ANSWER


def test_a_text_without_end_is_not_read_to_the_end(
    vllm: tuple[Replay, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_MOST_BYTES", 10_000)
    vllm[0].fault = answering(200, " " * 20_000)
    engine = load(vllm[1])
    with pytest.raises(SpecguardError, match="answers without end"):
        asyncio.run(engine.generate(JOB))


def test_what_breaks_or_is_busy_is_asked_again(
    vllm: tuple[Replay, str], llama: tuple[Replay, str]
) -> None:
    """A step begun in a stream goes on behind the tokens that came."""
    seen: set[str] = set()

    def once(handler: BaseHTTPRequestHandler, request: str) -> bool:
        if "completion" not in request or request in seen:
            return False
        seen.add(request)
        if len(seen) % 2:
            drop(handler)
        else:
            handler.send_response(429)
            handler.send_header("Retry-After", "0")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
        return True

    vllm[0].fault = llama[0].fault = once
    found = solve(llama[1], vllm[1])
    assert (found.answer, found.stats.num_accepted_steps) == (ANSWER, 3)
    assert len(seen) > 4


def test_a_stream_that_breaks_goes_on_behind_what_came(llama: tuple[Replay, str]) -> None:
    replay, url = llama
    whole = {name: each for name, each in replay.answers.items() if "completion" in name}
    prompts: list[list[int]] = []

    def broken(handler: BaseHTTPRequestHandler, request: str) -> bool:
        if "completion" not in request:
            return False
        asked = json.loads(request.split(" ", 2)[2])
        prompts.append(asked["prompt"])
        for name, (_, _, content) in whole.items():
            recorded = json.loads(name.split(" ", 2)[2])["prompt"]
            events = [line for line in content.splitlines() if line.startswith("data: ")]
            ids = [json.loads(line[6:])["tokens"] for line in events]
            written = [token_id for each in ids for token_id in each]
            done = asked["prompt"][len(recorded) :]
            if asked["prompt"][: len(recorded)] == recorded and written[: len(done)] == done:
                break
        else:
            return False
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for line in events[len(done) : len(done) + 3]:
            data = f"{line}\n\n".encode()
            handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        handler.wfile.flush()
        drop(handler)
        return True

    replay.fault = broken
    found = specguard.load(
        target=url, method="target", engine_args={"target.tokenizer": TOKENIZER}
    ).solve(SHELLS)
    assert found.answer == ANSWER
    assert len(prompts) > 10


def test_a_stream_may_say_that_it_has_failed(llama: tuple[Replay, str]) -> None:
    content = 'data: {"error": {"message": "out of memory"}}\n\n'
    engine = load(llama[1])
    llama[0].fault = answering(200, content, "text/event-stream")
    with pytest.raises(SpecguardError, match="gives up: out of memory"):
        asyncio.run(engine.generate(JOB))


def test_replicas_share_the_problems_and_keep_them(vllm: tuple[Replay, str]) -> None:
    other = Replay.read(RECORDED / "vllm.json")
    with serving(other) as url:
        solver = specguard.load(
            target=f"{vllm[1]},{url}",
            method="target",
            engine_args={"target.tokenizer": TOKENIZER},
        )
        for replay in vllm[0], other:
            replay.requests.clear()
        outcomes = list(solve_many(solver, [SHELLS] * 4, batch_size=4))
    assert [each.solution.answer for each in outcomes if each.solution] == [ANSWER] * 4
    counts = [sum("completion" in each for each in replay.requests) for replay in (vllm[0], other)]
    assert counts[0] == counts[1] == 6  # two problems of three steps each


def test_a_job_that_is_cancelled_ends_its_request(vllm: tuple[Replay, str]) -> None:
    replay, url = vllm
    asked, gone = threading.Event(), threading.Event()

    def endless(handler: BaseHTTPRequestHandler, request: str) -> bool:
        if "completion" not in request:
            return False
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"1\r\n \r\n")
                handler.wfile.flush()
                asked.set()
                time.sleep(0.01)
        except OSError:
            gone.set()
        return True

    engine = load(url)
    replay.fault = endless

    async def work() -> None:
        task = asyncio.create_task(engine.generate(JOB))
        await asyncio.to_thread(asked.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())
    assert gone.wait(10)


def test_a_key_is_sent_and_kept_out_of_records(
    vllm: tuple[Replay, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY, "a-secret")
    found = solve(str(TINY / "draft"), vllm[1], detail=True)
    assert all(each["Authorization"] == "Bearer a-secret" for each in vllm[0].headers)
    assert "a-secret" not in json.dumps(found.to_dict())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:secret@host:8000", "a user or a password"),
        ("http://", "no server's URL"),
        ("http://host:8000?key=1", "no server's URL"),
        ("http://host:port", "no server's URL"),
    ],
)
def test_urls_that_are_none_are_refused(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Client(url)
    assert "secret" not in f"{caught.value.message} {caught.value.hint}"


def test_a_url_may_be_that_of_openai_s_clients() -> None:
    for url in "http://host:8000", "http://host:8000/", "http://host:8000/v1/":
        assert base_url(url) == "http://host:8000"


def models(*cards: dict[str, Any]) -> Fault:
    def fault(handler: BaseHTTPRequestHandler, request: str) -> bool:
        if "/v1/models" in request:
            send(handler, 200, "application/json", json.dumps({"data": cards}))
        return "/v1/models" in request

    return fault


@pytest.mark.parametrize(
    ("fault", "arguments", "message"),
    [
        (models(), {}, "has 0 models"),
        (models({"id": "a"}, {"id": "b"}), {}, "has 2 models: a, b"),
        (models({"id": "a", "owned_by": "vllm"}), {"model": "b"}, "has no model 'b'"),
        (models({"id": "a", "owned_by": "library"}), {}, "a kind that cannot be used (library)"),
        (models({"id": "a", "owned_by": "vllm"}), {}, "does not say how long"),
        (models({"id": "a", "owned_by": "vllm"}), {"tokenizer": "/nowhere"}, "is not on this disk"),
        (models({"id": "a", "owned_by": "vllm"}), {"size": "3"}, "has no argument 'size'"),
    ],
)
def test_servers_that_cannot_be_used_are_refused(
    fault: Fault, arguments: dict[str, str], message: str, vllm: tuple[Replay, str]
) -> None:
    vllm[0].fault = fault
    with pytest.raises(SpecguardError) as caught:
        load(vllm[1], **arguments)
    assert message in caught.value.message


def test_another_tokenizer_is_noticed(vllm: tuple[Replay, str]) -> None:
    def other(handler: BaseHTTPRequestHandler, request: str) -> bool:
        if "/detokenize" in request:
            send(handler, 200, "application/json", '{"prompt": "something else"}')
        return "/detokenize" in request

    vllm[0].fault = other
    with pytest.raises(SpecguardError, match="has another tokenizer"):
        load(vllm[1])


def test_the_command_line_takes_urls(vllm: tuple[Replay, str]) -> None:
    options = ("--target", vllm[1], "--tokenizer", TOKENIZER, "--method", "target")
    assert "Answer: 33" in invoke("solve", SHELLS, *options).stdout
    for arguments, message in (
        ((*options, "--target-model", "other"), "has no model 'other'"),
        ((*options, "--dtype", "bfloat16"), "computes in the number type"),
        (("--draft", "a", "--draft", "b"), "only URLs may be given several times"),
        (("--target-model", "x"), "it needs --target URL"),
        (("--tokenizer", "x"), "it needs a URL"),
    ):
        refused = invoke("solve", SHELLS, *arguments)
        assert refused.exit_code in (1, 2)
        assert message in refused.stderr


def test_nobody_there_is_one_line() -> None:
    refused = invoke("solve", SHELLS, "--target", "http://127.0.0.1:9", "--method", "target")
    assert refused.exit_code == 1
    assert "no answer from http://127.0.0.1:9" in refused.stderr
    assert len(refused.stderr.splitlines()) == 2


def test_a_server_in_front_outlives_an_engine_behind_it(vllm: tuple[Replay, str]) -> None:
    """The engine dies in mid-stream: a clean error there, others go on, and it recovers."""
    replay, url = vllm
    solver = specguard.load(
        draft=str(TINY / "draft"),
        target=url,
        backend="cpu",
        draft_cost=None,
        engine_args={"target.tokenizer": TOKENIZER},
    )
    num_asked = 0

    def dies(handler: BaseHTTPRequestHandler, request: str) -> bool:
        nonlocal num_asked
        num_asked += "completion" in request
        if num_asked > 1:  # the first step is verified
            drop(handler)
        return num_asked > 1

    with behind(solver) as served:
        whole = served.answer(SHELLS, temperature=0)["choices"][0]["message"]["content"]
        replay.fault = dies
        response = served.chat(SHELLS, temperature=0, stream=True)
        events = [line for line in response.text.split("\n\n") if line.startswith("data: {")]
        assert "Given." in "".join(events)
        assert "no answer from" in json.loads(events[-1][6:])["error"]["message"]
        own = served.answer(SHELLS, temperature=0, specguard={"method": "draft"})
        assert own["choices"][0]["finish_reason"] == "stop"
        assert served.client.get("/health").status_code == 200
        replay.fault = lambda handler, request: False
        assert served.answer(SHELLS, temperature=0)["choices"][0]["message"]["content"] == whole

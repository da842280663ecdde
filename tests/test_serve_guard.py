"""Who may use the server, and what is read of a request before it is let in."""

import asyncio
import errno
import io
import logging
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from click.testing import CliRunner

from specguard.cli.main import main
from specguard.core import SolveConfig, Solver, SpecguardError, UsageError
from specguard.serve.guard import Guard
from specguard.serve.limits import Limits
from specguard.serve.metrics import Metrics
from specguard.serve.server import Address, LogHandler, read_keys
from tests.scripted import Scripted
from tests.serving import refusal_of, serving


def solver() -> Solver:
    return Solver(None, Scripted("t", ["So \\boxed{7}."]), SolveConfig(method="target"))


def test_a_key_is_needed_where_there_are_some() -> None:
    with serving(solver(), keys=("one", "two")) as served:
        for headers in {}, {"Authorization": "Bearer three"}, {"Authorization": "Basic one"}:
            response = served.client.get("/v1/models", headers=headers)
            assert "API key" in refusal_of(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"
            assert "three" not in response.text
        assert served.client.get("/metrics").status_code == 401
        for key in "one", "two":
            headers = {"Authorization": f"Bearer {key}"}
            assert served.client.get("/v1/models", headers=headers).status_code == 200
        assert served.client.get("/health").status_code == 200
        assert served.client.get("/").status_code == 200


def test_a_page_on_the_web_cannot_reach_a_server_of_this_machine() -> None:
    hosts = Address().hosts
    with serving(solver(), hosts=hosts, headers={"Host": "127.0.0.1:8000"}) as served:
        assert served.answer("p")
        for host in "localhost:8000", "[::1]:8000", "LOCALHOST":
            assert served.client.get("/health", headers={"Host": host}).status_code == 200
        for host in "evil.example:8000", "[", "":
            refusal_of(served.client.get("/v1/models", headers={"Host": host}), 403)
        body = '{"model": "m", "messages": [{"role": "user", "content": "p"}]}'
        headers = {"Content-Type": "text/plain"}  # which needs no preflight
        plain = served.client.post("/v1/chat/completions", content=body, headers=headers)
        assert "application/json" in refusal_of(plain, 415)
        allowed = served.client.get("/health", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in allowed.headers


def test_pages_that_were_named_may_use_it() -> None:
    named = "https://chat.example"
    with serving(solver(), keys=("k",), origins=(named,)) as served:
        headers = {"Origin": named, "Access-Control-Request-Method": "POST"}
        headers["Access-Control-Request-Headers"] = "authorization"
        asked = served.client.options("/v1/chat/completions", headers=headers)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == named
        other = served.client.options(
            "/v1/chat/completions", headers={**headers, "Origin": "https://evil.example"}
        )
        assert other.status_code == 400
        refused = served.client.get("/v1/models", headers={"Origin": named})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == named, "so that it can be read"


def test_bodies_are_limited_whatever_their_headers_say() -> None:
    with serving(solver(), limits={"body_bytes": 1000}) as served:
        assert "more than 1000 bytes" in served.refusal("x" * 1000, status=413)

        def pieces() -> Any:
            for _ in range(5):
                yield b" " * 300

        response = served.client.post(
            "/v1/chat/completions", content=pieces(), headers={"Content-Type": "application/json"}
        )
        assert "more than 1000 bytes" in refusal_of(response, 413)
        assert served.answer("p")


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def app(*_: Any) -> None:
        raise AssertionError("nothing is to be answered")

    async def receive() -> Any:
        await asyncio.sleep(60)

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    guard = Guard(app, (), None, Limits(body_seconds=0.05), Metrics())
    asyncio.run(guard(scope, receive, send))
    assert sent[0]["status"] == 408


def test_the_log_says_what_became_of_a_request_and_not_what_was_asked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "specguard")
    with serving(solver()) as served:
        served.answer("a secret")
        served.client.get("/x%0aforged%1b[31m")
    assert 'POST "/v1/chat/completions" 200' in caplog.text
    assert "secret" not in caplog.text
    assert "\\nforged" in caplog.text
    assert "\nforged" not in caplog.text
    assert "\x1b" not in caplog.text
    with serving(solver(), logs_prompts=True) as served:
        served.answer("a secret\nforged")
    assert 'prompt "a secret\\nforged"' in caplog.text


def test_a_defect_is_logged_and_its_client_told_nothing_of_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("a detail")

    with serving(solver()) as served:
        monkeypatch.setattr("specguard.serve.service.chat_prompt", fail)
        served.client._transport.raise_server_exceptions = False  # type: ignore[attr-defined]
        response = served.chat("p")
    assert "its log says why" in refusal_of(response, 500)
    assert "a detail" in caplog.text


def test_a_full_disk_under_the_log_is_no_reason_to_serve_nobody(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(errno.ENOSPC, "no space left on device")

    logger, handler = logging.getLogger("specguard"), LogHandler(Full())
    caplog.set_level(logging.INFO, "specguard")
    logger.addHandler(handler)
    try:
        with serving(solver()) as served:
            assert served.answer("p")
        assert "POST" in caplog.text
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr().err == ""


def test_without_a_key_only_this_machine_is_served() -> None:
    for host in "127.0.0.1", "localhost", "::1", "127.0.0.7":
        Address(host)
    for host in "0.0.0.0", "::", "192.168.1.5", "example.com", "":
        with pytest.raises(UsageError, match="without an API key"):
            Address(host)
        assert Address(host, keys=("k",)).hosts is None


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "specguard.serve.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(main, ["serve"])
    assert result.exit_code == 2
    assert "not installed: uvicorn" in result.stderr
    assert "pip install 'specguard[serve]'" in result.stderr


def test_keys_are_lines_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    with pytest.raises(UsageError, match="cannot be read"):
        read_keys(file)
    file.write_text("# mine\n\n")
    with pytest.raises(UsageError, match="holds no API key"):
        read_keys(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not valid UTF-8"):
        read_keys(file)
    file.write_text("# mine\n one \n\ntwo")
    assert read_keys(file) == ("one", "two")


def test_an_address_that_is_taken_is_an_error_with_a_hint() -> None:
    address = Address(port=0)
    with address.bind() as taken:
        port = taken.getsockname()[1]
        assert address.listen(taken) == f"http://127.0.0.1:{port}"
        with pytest.raises(SpecguardError, match="cannot be listened at") as refused:
            Address(port=port).bind()
        assert "--port" in refused.value.hint
        result = CliRunner().invoke(main, ["serve", "--port", str(port)])
        assert result.exit_code == 1
        assert "loading" not in result.stderr
    sixth: Any = Mock(getsockname=lambda: ("::1", 80, 0, 0))  # not every machine has it
    assert Address("::1").listen(sixth) == "http://[::1]:80"

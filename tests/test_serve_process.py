"""The server as its users meet it: a process, real clients, a browser, signals, bad weather."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from specguard.cli.main import main
from specguard.serve.limits import Limits
from specguard.serve.server import Address, serve
from tests.serving import PROBLEM, tiny

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-m", "specguard", "serve", "--models", "tiny", "--backend", "cpu"]
MESSAGES: list[Any] = [{"role": "user", "content": PROBLEM}]
LONG = {"k": 256, "fallback": False}  # so many candidates take a while


@dataclass
class Process:
    """A server of its own."""

    url: str
    process: subprocess.Popen[str]
    log: list[str]

    def body(self, stream: bool = True, **own: Any) -> bytes:
        asked = {"model": "tiny", "messages": MESSAGES, "stream": stream, "specguard": own}
        return json.dumps(asked).encode()

    def open(self) -> socket.socket:
        where = urlsplit(self.url)
        return socket.create_connection((where.hostname, where.port), timeout=30)

    def ask(self, **own: Any) -> socket.socket:
        """A connection on which a stream is asked for."""
        body = self.body(**own)
        opened = self.open()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        opened.sendall(head.encode() + body)
        return opened

    def metric(self, name: str) -> float:
        with self.open() as opened:
            opened.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            text = read_all(opened)
        [value] = re.findall(rf"^{re.escape(name)} (\S+)$", text.replace("\r", ""), re.MULTILINE)
        return float(value)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def read_all(opened: socket.socket) -> str:
    return b"".join(iter(lambda: opened.recv(65536), b"")).decode()


@contextmanager
def started(*arguments: str) -> Iterator[Process]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*COMMAND, "--port", "0", "--draft-cost", "0.5,0.05,3", *arguments]
    process = subprocess.Popen(command, text=True, env=environment, stderr=subprocess.PIPE)
    drain: threading.Thread | None = None
    log: list[str] = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            log.append(line)
            if match := re.search(r"Listening at (\S+)/v1", line):
                break
        else:
            raise AssertionError("".join(log))
        drain = threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True)
        drain.start()
        yield Process(match.group(1), process, log)
    finally:
        process.kill()
        process.wait()
        if drain is not None:
            drain.join()
        assert process.stderr is not None
        process.stderr.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with started() as process:
        yield process


@pytest.fixture(scope="module")
def solved() -> Any:
    return tiny().solve(PROBLEM)


def test_the_openai_client_works_unchanged(server: Process, solved: Any) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        [model] = client.models.list().data
        answer = client.chat.completions.create(model=model.id, messages=MESSAGES)
        assert answer.choices[0].message.content == solved.text
        assert answer.usage.completion_tokens == solved.stats.num_tokens
        assert answer.choices[0].specguard["answer"] == solved.answer
        stream = client.chat.completions.create(
            model=model.id,
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"specguard": {"method": "target"}},
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == tiny().solve(PROBLEM, method="target").text
        assert chunks[-1].usage.total_tokens > 0
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=model.id, messages=MESSAGES, logprobs=True)
        assert refused.value.param == "logprobs"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt", messages=MESSAGES)
        forced = {"specguard": {"force": True}}
        completed = client.completions.create(
            model=model.id, prompt="Leo has", max_tokens=4, extra_body=forced
        )
        assert completed.choices[0].text


def test_the_asynchronous_openai_client_works_unchanged(server: Process, solved: Any) -> None:
    openai = pytest.importorskip("openai")

    async def work() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            create = client.chat.completions.create

            async def streamed() -> str:
                stream = await create(model="tiny", messages=MESSAGES, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            whole = create(model="tiny", messages=MESSAGES)
            answers = await asyncio.gather(whole, *(streamed() for _ in range(4)))
            return [answers[0].choices[0].message.content, *answers[1:]]

    assert asyncio.run(work()) == [solved.text] * 5


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_a_stream(server: Process, solved: Any) -> None:
    command = ["curl", "--silent", "--no-buffer", f"{server.url}/v1/chat/completions"]
    command += ["-H", "Content-Type: application/json", "-d", server.body().decode()]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert said == solved.text


def test_who_hangs_up_frees_the_work(server: Process) -> None:
    waiting = 'specguard_solutions_total{finish_reason="cancelled"}'
    asked = [server.ask(**LONG), server.ask(stream=False, **LONG)]
    while server.metric("specguard_solutions_running") < 2:
        pass
    for opened in asked:
        opened.close()
    while server.metric("specguard_solutions_running") > 0:
        pass
    assert server.metric(waiting) == 2


def test_idle_connections_and_slow_readers_hold_nobody_up(server: Process, solved: Any) -> None:
    idle = [server.open() for _ in range(500)]
    slow = [server.ask(detail=True) for _ in range(4)]  # and nobody reads
    with server.ask() as opened:
        assert read_all(opened).count("accepted") > 1
    for opened in slow:
        text = read_all(opened)
        assert "data: [DONE]" in text
        opened.close()
    for opened in idle:
        opened.close()


def test_a_long_prompt_is_refused_and_holds_nobody_up(server: Process) -> None:
    body = server.body(stream=False, force=True).decode().replace(PROBLEM, "shells " * 150_000)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with server.open() as opened, server.ask() as other:
        opened.sendall(head.encode() + body.encode())
        assert "data: [DONE]" in read_all(other)
        text = read_all(opened)
    assert text.startswith("HTTP/1.1 400")
    assert "context_length_exceeded" in text


def test_what_runs_is_finished_before_the_server_ends() -> None:
    with started() as server:
        opened = server.ask(**LONG)
        assert opened.recv(4096).startswith(b"HTTP/1.1 200")
        server.process.send_signal(signal.SIGTERM)
        assert "data: [DONE]" in read_all(opened)
        assert server.process.wait(60) == 0
        opened.close()


def test_a_server_told_to_stop_as_soon_as_it_listens_stops() -> None:
    was_late = threading.Event()

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def stop_late() -> None:
        was_late.set()
        stop()

    watchdog = threading.Timer(30, stop_late)
    watchdog.start()
    address = Address("127.0.0.1", 0)
    try:
        with address.bind() as bound:
            serve(tiny(), "m", address, bound, Limits(), begun=lambda url: stop())
    finally:
        watchdog.cancel()
    assert not was_late.is_set()


def test_what_takes_too_long_is_told_so_when_the_server_ends() -> None:
    with started("--drain", "0") as server:
        opened = server.ask(stream=False, k=4096, fallback=False)
        while server.metric("specguard_solutions_running") < 1:
            pass
        assert server.stop() == 0
        read_all(opened)
        opened.close()


def test_what_cannot_be_served_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(main, ["serve", *arguments])

    result = run("--host", "0.0.0.0")
    assert result.exit_code == 2
    assert "without an API key" in result.stderr
    result = run("--api-key-file", str(tmp_path / "none"))
    assert result.exit_code == 2
    assert "cannot be read" in result.stderr
    result = run("--models", "nothing")
    assert result.exit_code == 2


def test_the_page_shows_steps_as_they_come(browser: Any, server: Process) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def text_of(name: str) -> str:
        return str(browser.find_element(By.ID, name).text)

    browser.set_window_size(360, 740)  # a phone
    browser.get(f"{server.url}/")
    assert browser.title == "SpecGuard: tiny"
    focused = browser.switch_to.active_element
    assert focused.get_attribute("id") == "problem", "typing can begin at once"
    focused.send_keys(Keys.CONTROL, Keys.ENTER)
    WebDriverWait(browser, 20).until(lambda _: text_of("answer"))
    assert text_of("answer") == "Answer: 33 (finished by answer)"
    steps = browser.find_elements(By.CSS_SELECTOR, "#steps > li")
    assert len(steps) == 3
    assert "accepted draft" in steps[0].text
    assert ">= 0.70" in steps[0].text
    scores = steps[0].find_element(By.TAG_NAME, "table")
    assert not scores.is_displayed()
    steps[0].find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    assert scores.is_displayed()
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= browser.execute_script("return window.innerWidth"), "nothing to scroll sideways"
    # By keyboard alone: settings, the method, and again.
    browser.find_element(By.CSS_SELECTOR, "form summary").send_keys(Keys.ENTER)
    browser.find_element(By.ID, "method").send_keys("target")
    browser.find_element(By.ID, "solve").send_keys(Keys.ENTER)
    WebDriverWait(browser, 20).until(lambda _: "nothing was judged" in text_of("facts"))
    # What a server says is text, whatever it looks like.
    problem = browser.find_element(By.ID, "problem")
    problem.clear()
    problem.send_keys("<img src=x onerror=alert(1)>", Keys.CONTROL, Keys.ENTER)
    WebDriverWait(browser, 20).until(lambda _: "cannot solve this" in text_of("status"))
    assert browser.find_elements(By.CSS_SELECTOR, "main img") == []
    # A solution can be stopped.
    problem.clear()
    problem.send_keys(PROBLEM)
    browser.find_element(By.ID, "method").send_keys("specguard")
    browser.find_element(By.ID, "k").send_keys("64")
    problem.send_keys(Keys.CONTROL, Keys.ENTER)
    problem.send_keys(Keys.ESCAPE)
    WebDriverWait(browser, 20).until(lambda _: text_of("status") == "Stopped")
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert len(errors) == 1, errors  # the answer 400

"""The scripts that drive a server: few requests, and what they make of what goes wrong."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import clients, load, soak
from benchmarks.served import Reply, Server
from specguard import SpecguardError


def run(command: Any, *arguments: object) -> str:
    result = CliRunner().invoke(command, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
def test_load_compares_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    lines = json.loads(run(load.main, "--clients", 2, "--requests", 3, "--json"))["lines"]
    assert [line["way"] for line in lines] == ["solve_many", *(way for way, _, _ in load.WAYS)]
    for line in lines[1:]:
        assert 0 < line["median"] <= line["p95"]
        assert (line["first_step"] is not None) == ("streamed" in line["way"])


@pytest.mark.slow
def test_soak_counts_and_compares_every_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ("--requests", 40, "--minutes", 0.02, "--problems", 2, "--clients", 4, "--json")
    found = json.loads(run(soak.main, *options))
    assert sum(found["outcomes"].values()) == 40
    assert found["outcomes"].keys() == {"answered", "broken", "cut off"}
    assert found["failures"] == []
    assert min(found["memory"]) > 0


@pytest.mark.slow
def test_clients_that_are_there_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    table = run(clients.main, "openai", "curl")
    assert table.count("\\boxed{") + table.count("not installed") == 2


def test_of_ten_requests_one_hangs_up_and_one_is_broken() -> None:
    made = list(soak.calls(5000, 7))
    troubles = Counter(call.trouble for call in made)
    assert 400 < troubles["cut"] < 600
    assert 400 < troubles["broken"] < 600
    assert {call.problem for call in made} == set(range(7))
    assert made == list(soak.calls(5000, 7)), "a run can be repeated"


def test_a_wrong_answer_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = {"choices": [{"delta": {"content": "wrong"}}]}

    async def answer(*_: Any, **__: Any) -> Reply:
        return Reply(200, [chunk], 0.1, 0.1)

    for module in load, soak:
        monkeypatch.setattr(module, "ask", answer)
    found = soak.Found()
    call = soak.Call(0, 0, True, None, 0)
    server: Any = Server("http://here", None)  # type: ignore[arg-type]
    asyncio.run(soak._make(server, ["p"], {(0, 0): "right"}, call, found))
    assert len(found.failures) == 1
    asyncio.run(soak._make(server, ["p"], {(0, 0): "wrong"}, call, found))
    broken = soak.Call(0, 0, True, "broken", 0)
    asyncio.run(soak._make(server, ["p"], {}, broken, found))
    assert len(found.failures) == 2, "what is broken must not be answered"
    assert found.outcomes == {"answered": 2, "broken": 1}


def test_a_refused_request_ends_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: Any, **__: Any) -> Reply:
        return Reply(429, [{"error": {}}], 0.1)

    monkeypatch.setattr(load, "ask", refuse)
    with pytest.raises(SpecguardError, match="429"):
        asyncio.run(load.drive("http://here", ["p"], 1, stream=False))


def test_growth_is_of_the_median_from_quarter_to_quarter() -> None:
    found = soak.Found(memory=[900.0] * 4 + [100.0] * 4 + [500.0] * 4 + [103.0] * 4)
    assert found.growth == 3.0
    assert soak.Found().growth == 0.0


def test_a_client_that_is_not_there_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        clients._runner([str(tmp_path)])(["no-such-client"], {})

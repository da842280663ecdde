"""The vLLM backend apart from vLLM: what it refuses, and its thread when things go wrong.

What needs vLLM is skipped without it; .ci/engines runs it.
"""

import asyncio
import gc
import importlib.util
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import specguard
from specguard.backends.registry import arguments_by_role, find_backend
from specguard.backends.vllm import backend as backend_module
from specguard.backends.vllm.backend import VLLM
from specguard.backends.vllm.loading import demand, is_supported, parsed_arguments
from specguard.cli.main import main
from specguard.core import (
    GREEDY,
    Boundary,
    Sampling,
    Solver,
    SpecguardError,
    UsageError,
    VerifierConfig,
    ensemble_weights,
)
from specguard.models.tiny import problems
from tests import fake_vllm
from tests.conftest import PROBLEM, TINY
from tests.contract.calls import PREFIX, generate_job, run, score_job

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed: .ci/engines runs this"
)
LONG = tuple(range(30, 130))
ENDLESS = Boundary("", frozenset(), 300)
SMALL = {"enforce_eager": "true", "kv_cache_memory_bytes": "64M"}


@pytest.fixture
def fake(checkpoint: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        fake_vllm.install(patch)
        yield fake_vllm.load(checkpoint)


def llm_of(engine: Any) -> fake_vllm.FakeLLM:
    llm: fake_vllm.FakeLLM = engine._handle.llm
    return llm


@pytest.mark.parametrize("is_limited", [True, False])
def test_a_step_that_was_drawn_here_is_scored_without_reading_its_prefix_again(
    fake: Any, checkpoint: Path, is_limited: bool
) -> None:
    engine = fake_vllm.load(checkpoint, is_limited)
    job = replace(generate_job(engine, LONG, 1, 20, GREEDY), uniforms=None)
    [drawn] = run(engine, job)
    llm_of(engine).num_read = 0
    [seen] = run(engine, score_job([drawn.token_ids], LONG))
    assert seen.is_first_choice.all()
    num_read = llm_of(engine).num_read
    num_step = len(drawn.token_ids)
    assert num_read <= num_step + fake_vllm.BLOCK if is_limited else num_read > len(LONG)


def test_a_failing_engine_fails_its_jobs_and_those_that_follow(fake: Any) -> None:
    llm_of(fake).fails = True

    async def work() -> list[Any]:
        jobs = [fake.generate(generate_job(fake)), fake.score(score_job([[50]]))]
        return await asyncio.wait_for(asyncio.gather(*jobs, return_exceptions=True), 30)

    for _ in range(2):
        for outcome in asyncio.run(work()):
            assert str(outcome) == "vLLM has failed: out of memory"


def test_a_request_that_vllm_refuses_is_the_error_of_its_job(fake: Any) -> None:
    llm_of(fake).num_tokens = 100  # fewer than the tokenizer has
    with pytest.raises(SpecguardError, match=r"refuses a request: Token id 300 is out of vocab"):
        run(fake, score_job([[50], [300]]))
    assert not llm_of(fake).running
    assert len(run(fake, score_job([[50]]))) == 1


def test_an_engine_that_nobody_holds_is_closed_and_others_go_on(
    fake: Any, checkpoint: Path
) -> None:
    other = fake_vllm.load(checkpoint)
    llm, thread = llm_of(other), other._handle._driver
    del other
    gc.collect()
    thread.call(lambda: None)
    assert llm.is_closed
    assert not llm_of(fake).is_closed
    assert len(run(fake, generate_job(fake))) == 2


def test_engines_share_a_thread(fake: Any, checkpoint: Path) -> None:
    other = fake_vllm.load(checkpoint)
    names = {
        engine._handle._driver.call(lambda: threading.current_thread().name)
        for engine in (fake, other)
    }
    assert names == {"specguard-vllm"}
    job = replace(generate_job(fake, PREFIX, 1, 300, GREEDY), boundary=ENDLESS, uniforms=None)

    async def work() -> Any:
        endless = asyncio.create_task(fake.generate(job))
        found = await asyncio.wait_for(other.generate(generate_job(other)), 30)
        assert not endless.done()  # passes take turns
        endless.cancel()
        return found

    assert len(asyncio.run(work())) == 2


def test_a_sequence_that_vllm_gives_up_is_an_error(fake: Any) -> None:
    llm = llm_of(fake)
    job = generate_job(fake, PREFIX, 1, 9, Sampling(0.7, 0.8))
    add = llm.add_request

    def shorten(name: str, prompt: Any, params: Any) -> str:
        params.max_tokens = 2
        return add(name, prompt, params)

    llm.add_request = shorten  # type: ignore[method-assign]
    with pytest.raises(SpecguardError, match="given up a request") as caught:
        run(fake, replace(job, boundary=Boundary("", frozenset(), 9)))
    assert "kv_cache_memory_bytes" in caught.value.hint


@pytest.mark.parametrize(
    ("found", "is_usable"),
    [
        ("0.32.0", True),
        ("0.32.4+cu130", True),
        ("0.31.9", False),
        ("0.33.0", False),
        ("dev", False),
    ],
)
def test_one_release_is_supported(
    monkeypatch: pytest.MonkeyPatch, found: str, is_usable: bool
) -> None:
    monkeypatch.setattr(backend_module, "installed_version", lambda: found)
    monkeypatch.setattr(backend_module, "find_spec", lambda name: True)
    status = VLLM.status()
    assert is_supported(found) == status.is_usable == is_usable
    if not is_usable:
        assert found in status.reason
        assert "0.32" in status.hint


def test_without_vllm_the_backend_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "installed_version", lambda: None)
    assert VLLM.status().hint.startswith("pip install 'specguard[vllm]'")
    with pytest.raises(SpecguardError, match="'vllm' cannot be used: vllm is not installed"):
        specguard.load("tiny", backend="vllm")


def test_what_the_backend_cannot_do_is_refused() -> None:
    folder = str(TINY / "draft")
    for refused in VLLM.load, VLLM.demand:
        with pytest.raises(UsageError, match="takes no device number"):
            refused(folder, "auto", *([False] if refused == VLLM.load else []), "vllm:1")  # type: ignore[operator]
    with pytest.raises(SpecguardError, match="cannot run a reward model"):
        VLLM.load(folder, "auto", False, None, is_headless=True)


def test_what_a_model_takes() -> None:
    own, half = (demand(str(TINY / "target"), dtype) for dtype in ("float32", "bfloat16"))
    assert own.num_weight_bytes > 10**6
    assert half.num_weight_bytes * 2 == own.num_weight_bytes
    assert half.num_bytes_per_token * 2 == own.num_bytes_per_token


def test_arguments_go_to_the_engines_that_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(VLLM), "status", lambda self: find_backend("cpu").status())
    both = {"draft": "vllm", "target": "vllm"}
    given = {"seed": "1", "target.block_size": "64", "draft.seed": "2"}
    assert arguments_by_role(given, both) == {
        "draft": {"seed": "2"},
        "target": {"seed": "1", "block_size": "64"},
    }
    mixed = {"draft": "cpu", "target": "vllm"}
    assert arguments_by_role({"seed": "1"}, mixed) == {"draft": {}, "target": {"seed": "1"}}
    for wrong, backends in (
        ({"draft.seed": "1"}, mixed),
        ({"judge.seed": "1"}, both),
        ({"seed": "1"}, {"target": "cpu"}),
    ):
        with pytest.raises(UsageError, match="takes no engine arguments"):
            arguments_by_role(wrong, backends)
    assert VLLM.with_arguments({"a": "1"}).with_arguments({"b": "2"}) == replace(  # type: ignore[attr-defined]
        VLLM, arguments={"a": "1", "b": "2"}
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("enforce_eager", "--engine-arg must be NAME=VALUE, not 'enforce_eager'"),
        ("=1", "--engine-arg must be NAME=VALUE"),
        ("enforce-eager=true", "takes no engine arguments: enforce_eager"),
    ],
)
def test_bad_arguments_on_the_command_line(argument: str, message: str) -> None:
    options = ["solve", PROBLEM, "--models", "tiny", "--backend", "cpu", "--engine-arg", argument]
    result = CliRunner().invoke(main, options)
    assert result.exit_code != 0
    assert message in result.output


@needs_vllm
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when vLLM is imported
def test_arguments_are_read_as_vllm_reads_them() -> None:
    given = {"enforce_eager": "false", "max_model_len": "4k", "gpu_memory_utilization": "0.5"}
    values = {"enforce_eager": False, "max_model_len": 4000, "gpu_memory_utilization": 0.5}
    assert parsed_arguments(given) == values
    for name, value, message in (
        ("max_model_length", "3", "no engine argument 'max_model_length'"),
        ("max_model_len", "many", "max_model_len=many: .*invalid"),
        ("model", "x", "set by specguard itself"),
        ("enforce_eager", "perhaps", "enforce_eager=perhaps"),
    ):
        with pytest.raises(UsageError, match=message):
            parsed_arguments({name: value})


@needs_vllm
def test_what_vllm_cannot_load_is_one_error() -> None:
    backend = VLLM.with_arguments({"max_model_len": "1000000", **SMALL})
    with pytest.raises(SpecguardError, match=r"vLLM cannot load .*draft .*llama"):
        backend.load(str(TINY / "draft"), "float32", False, None)


@needs_vllm
def test_the_built_in_pair_writes_what_torch_writes() -> None:
    """Greedy, in float32: each model alone, and both together."""
    options: dict[str, Any] = {"dtype": "float32", "draft_cost": None}
    ours = specguard.load("tiny", backend="vllm", engine_args=SMALL, **options)
    theirs = specguard.load("tiny", backend="cpu", **options)
    judged = VerifierConfig(
        model="target", weights={"log_prob": 1.0}, bounds={"log_prob": (-0.5, 0.0)}
    )
    grounded = VerifierConfig(weights=ensemble_weights(0.3), sources="problem")
    pair: dict[str, Any] = {"num_candidates": 1, "sampling": GREEDY, "selector": "ngram"}
    decisions = set()
    for settings in (
        {"method": "target"},
        {"method": "draft"},
        {**pair, "verifier": judged},
        {**pair, "verifier": grounded},
    ):
        for problem in islice(problems.stream(problems.HELD_OUT), 5):
            found, wanted = (
                Solver(pair.draft, pair.target, ours.config).solve(problem.text, **settings)
                for pair in (ours, theirs)
            )
            assert found.text == wanted.text
            told, expected = ([step.decision for step in each.steps] for each in (found, wanted))
            assert told == expected
            decisions |= set(told)
    assert {"accepted", "rewritten"} <= decisions

"""The MLX backend: what it computes and when, its memory, and threads."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import mlx.core as mx

import specguard
from specguard.backends.local.layer import Row
from specguard.backends.mlx.layer import MlxLayer
from specguard.backends.mlx.loading import load_model
from specguard.core import GREEDY, Boundary, Capture, VerifierConfig, solve_many
from specguard.models.tiny import problems
from tests.conftest import PROBLEM
from tests.contract.calls import FLAT, PREFIX, capture, generate_job, run, score_job
from tests.rollout import block_of

NEVER = Boundary("never", frozenset(), 4)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in decoding: "run" for a pass, "feed" for a token that Python reads."""
    from specguard.core.text import StepScanner

    events: list[str] = []
    forward, feed = MlxLayer.forward, StepScanner.feed

    def spy_forward(self: MlxLayer, *arguments: Any) -> Any:
        events.append("run")
        return forward(self, *arguments)

    def spy_feed(self: StepScanner, token_id: int) -> Any:
        events.append("feed")
        return feed(self, token_id)

    monkeypatch.setattr(MlxLayer, "forward", spy_forward)
    monkeypatch.setattr(StepScanner, "feed", spy_feed)
    return events


def test_python_reads_a_token_while_the_next_pass_is_under_way(
    checkpoint: Path, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_model(str(checkpoint))
    passes.clear()
    monkeypatch.setattr(mx, "eval", lambda *arrays: pytest.fail("Python waits"))
    job = generate_job(engine, cap=4, sampling=GREEDY, boundary=NEVER)
    run(engine, job)
    # The prefix, then one pass ahead of every pair of tokens but the last.
    assert passes == ["run", *["run", "feed", "feed"] * 3, "feed", "feed"]


@pytest.mark.parametrize("num_candidates", [1, 3])
def test_an_accepted_step_is_not_computed_again(
    checkpoint: Path, passes: list[str], num_candidates: int
) -> None:
    engine = load_model(str(checkpoint))
    prefix = PREFIX
    # Every letter ends a step, so all candidates end before the cap.
    boundary = Boundary("a", frozenset(), 200)
    for number in range(3):
        passes.clear()
        draws = np.random.default_rng(number).random((num_candidates, 200), dtype=np.float32)
        job = generate_job(
            engine, prefix, num_candidates, sampling=FLAT, boundary=boundary, uniforms=draws
        )
        candidates = run(engine, job)
        assert {candidate.finish for candidate in candidates} == {"delimiter"}
        longest = max(len(candidate.token_ids) for candidate in candidates)
        assert passes.count("run") == longest + (number == 0)
        prefix += candidates[-1].token_ids


def test_candidates_do_not_copy_the_prefix(checkpoint: Path) -> None:
    engine = load_model(str(checkpoint))
    prefix = tuple(range(3, 453))
    peaks = []
    for k in 1, 16:
        job = generate_job(engine, prefix, k, 2, GREEDY, boundary=Boundary("never", frozenset(), 2))
        run(engine, job)  # the buffer grows once
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        run(engine, job)
        peaks.append(mx.get_peak_memory() - before)
    held = len(prefix) * engine.num_bytes_per_token
    assert peaks[1] - peaks[0] < held  # 16 copies would be 15 more


def test_half_precision_captures_in_single() -> None:
    """Weights of bfloat16 queries and keys are exact to single precision."""
    from specguard.backends.local.layer import RowCapture
    from specguard.backends.mlx.attention import DeviceCapture, _weights, attention_block

    mx.random.seed(0)
    query, key = (
        mx.random.normal(shape).astype(mx.bfloat16) for shape in ((1, 4, 3, 64), (1, 2, 40, 64))
    )
    is_source = np.arange(38) % 2 == 0
    wanted = RowCapture(Capture(is_source, 1, 0.01), [0, 1, 2], list(range(40)))
    read = _weights(query, key, 0.125, 3)
    source_mass, sink_mass, step = attention_block(read, DeviceCapture.of(wanted, 0))
    queries, keys = (
        np.array(array[0].astype(mx.float32), dtype=np.float64) for array in (query, key)
    )
    scores = 0.125 * queries @ np.repeat(keys, 2, axis=0).swapaxes(1, 2)
    scores[:, np.triu_indices(3, 1)[0], 37 + np.triu_indices(3, 1)[1]] = -np.inf
    weights = np.tile(np.eye(40), (4, 1, 1))  # the context's own rows do not matter
    weights[:, 37:] = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = block_of(weights, is_source, 3, 0.01)
    np.testing.assert_allclose(np.array(source_mass), expected.source_mass, atol=1e-5)
    np.testing.assert_allclose(np.array(sink_mass), expected.sink_mass, atol=1e-5)
    np.testing.assert_allclose(np.array(step), expected.step, atol=1e-5)


def test_only_the_last_layers_are_captured(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specguard.backends.mlx import attention

    captured: list[int] = []
    original = attention.attention_block

    def spy(*arguments: Any) -> Any:
        captured.append(1)
        return original(*arguments)

    monkeypatch.setattr(attention, "attention_block", spy)
    engine = load_model(str(checkpoint))
    run(engine, score_job([[8, 9]]))
    assert not captured
    run(engine, score_job([[8, 9]], capture=capture(PREFIX, num_layers=2)))
    assert len(captured) == 2


def test_tokens_are_exact_in_a_large_vocabulary() -> None:
    """A running sum in single precision would miss small probabilities at the end."""
    from specguard.backends.mlx.sampling import draw

    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((1, 151_936))
    probs = (np.exp(logits) / np.exp(logits).sum()).astype(np.float32)
    uniforms = rng.random(200, dtype=np.float32)
    cdf = np.cumsum(probs[0], dtype=np.float64)
    expected = np.searchsorted(cdf, uniforms * cdf[-1], side="right")
    found = np.array(draw(mx.repeat(mx.array(probs), 200, axis=0), mx.array(uniforms)))
    # What is left is rounding: the uniform lies within 1e-6 of the token that was drawn.
    begins, ends = cdf[found] - probs[0, found], cdf[found]
    assert ((uniforms > begins - 1e-6) & (uniforms < ends + 1e-6)).all()
    assert (found == expected).mean() > 0.95
    # What has no weight is never drawn, not even by the largest uniform.
    weights = mx.array([[0.0, 0.3, 0.0, 0.7] + [0.0] * 600])
    for uniform, token_id in (0.0, 1), (0.299, 1), (0.301, 3), (1 - 2**-24, 3):
        assert draw(weights, mx.array([uniform])).item() == token_id


def test_a_verifying_pass_and_plain_probabilities_agree(checkpoint: Path) -> None:
    """A captured layer computes its output in another way: the same log-probs come out."""
    engine = load_model(str(checkpoint))
    step = [60, 61, 62, 63, 64]
    run(engine, score_job([[50]]))  # so that the step alone is forwarded, and all of it is read
    [captured] = run(engine, score_job([step], capture=capture(PREFIX, num_layers=4)))
    [plain] = run(engine, score_job([step]))
    assert captured.blocks is not None
    np.testing.assert_allclose(captured.token_logprobs, plain.token_logprobs, atol=1e-5)


def test_solving_restarts_nothing(passes: list[str]) -> None:
    """With the target's verdict alone, a problem costs one target pass a step."""
    solver = specguard.load("tiny", backend="mlx")
    passes.clear()
    accepting = VerifierConfig(weights={"log_prob": 1.0}, threshold=0.0)
    solution = solver.solve(PROBLEM, num_candidates=1, verifier=accepting)
    assert solution.stats.num_accepted_steps == solution.stats.num_steps
    # Draft: the prompt, then one pass a token. Target: one pass a step, with the prompt in the
    # first.
    assert passes.count("run") == 1 + solution.stats.num_tokens + solution.stats.num_steps


@pytest.mark.parametrize("settings", [{"method": "sd"}, {"num_candidates": 3}])
def test_a_batch_goes_from_thread_to_thread(settings: dict[str, Any]) -> None:
    solver = specguard.load("tiny", backend="mlx", **settings)
    texts = [problem.text for problem in islice(problems.stream(problems.HELD_OUT), 4)]
    finished = solve_many(solver, texts, batch_size=3)
    answers = {}
    for _ in texts:
        with ThreadPoolExecutor(1) as pool:
            outcome = pool.submit(next, finished).result()
        assert outcome.solution is not None
        answers[outcome.index] = outcome.solution.text
    assert [answers[index] for index in range(4)] == [solver.solve(text).text for text in texts]


def test_what_one_thread_has_made_another_can_use(checkpoint: Path) -> None:
    """Between two passes, whatever is kept may be wanted by another thread: nothing is lazy."""
    layer = load_model(str(checkpoint)).layer

    def make() -> tuple[Any, ...]:
        first, second, third = (layer.new_buffer() for _ in range(3))
        outputs = layer.forward([Row(first, 0, 4, 0)], [5, 6, 7, 8], range(4), [2, 3])
        assert outputs is not None
        layer.forward([Row(third, 0, 2, 0)], [5, 6], range(2), None)
        second.copy_from(first, 3)
        first.copy_columns(1, [2, 3])
        taken, joined = layer.take(outputs, [1]), layer.joined([outputs, outputs])
        return first, second, third, (*outputs, *taken, *joined)

    with ThreadPoolExecutor(1) as pool:
        *buffers, arrays = pool.submit(make).result()
    expected = make()
    for found, wanted in zip(buffers, expected, strict=False):
        for array, other in zip(found.arrays(), wanted.arrays(), strict=True):
            assert mx.allclose(array[:, :, :2], other[:, :, :2])
    for array, other in zip(arrays, expected[-1], strict=True):
        assert mx.allclose(array, other)


def test_a_thread_that_has_used_the_model_lets_the_process_end() -> None:
    script = (
        "import threading, specguard\n"
        "solver = specguard.load('tiny', backend='mlx', num_candidates=3)\n"
        f"work = lambda: print(solver.solve({PROBLEM!r}).answer)\n"
        "worker = threading.Thread(target=work)\n"
        "worker.start()\n"
        "worker.join()\n"
    )
    for _ in range(3):  # without `threads.clear_at_thread_end`, every second process aborts
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.strip() == "12"


@pytest.mark.parametrize("settings", [{"method": "target"}, {"num_candidates": 3}])
def test_compiled_functions_change_no_solution(settings: dict[str, Any]) -> None:
    solver = specguard.load("tiny", backend="mlx", **settings)
    compiled = solver.solve(PROBLEM)
    mx.disable_compile()
    try:
        plain = solver.solve(PROBLEM)
    finally:
        mx.enable_compile()
    assert compiled.text == plain.text
    for step, expected in zip(compiled.steps, plain.steps, strict=True):
        assert step.signals == pytest.approx(expected.signals, abs=1e-4)

"""The MLX backend: what it loads and refuses, what it computes and when, and its memory."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import mlx.core as mx
import torch
from mlx_lm.models import base

import specguard
from specguard.backends.mlx.backend import MLX
from specguard.backends.mlx.forward import Forward
from specguard.backends.mlx.loading import load_model
from specguard.core import (
    GREEDY,
    Boundary,
    Engine,
    Prompt,
    Sampling,
    SolveConfig,
    SpecguardError,
    UsageError,
    VerifierConfig,
    solve_many,
)
from specguard.models.tiny import problems
from tests.conftest import PROBLEM, TINY, eager, make_checkpoint
from tests.rollout import block_of

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module", params=[4, 8])
def quantised(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The built-in pair in 4 and in 8 bits, by mlx-lm's own converter."""
    from mlx_lm import convert

    folder = tmp_path_factory.mktemp("quantised")
    for role in "draft", "target":
        convert(
            str(TINY / role),
            str(folder / role),
            quantize=True,
            q_bits=request.param,
            q_group_size=32,
        )
    return {role: str(folder / role) for role in ("draft", "target")}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in decoding: "run" for a pass, "feed" for a token that Python reads."""
    from specguard.core.text import StepScanner

    events: list[str] = []
    run, feed = Forward.run, StepScanner.feed

    def spy_run(self: Forward, rows: Any, tokens: Any, offset: Any) -> Any:
        events.append("run")
        return run(self, rows, tokens, offset)

    def spy_feed(self: StepScanner, token_id: int) -> Any:
        events.append("feed")
        return feed(self, token_id)

    monkeypatch.setattr(Forward, "run", spy_run)
    monkeypatch.setattr(StepScanner, "feed", spy_feed)
    return events


def test_a_quantised_pair_solves(quantised: dict[str, str]) -> None:
    assert "quantization" in json.loads((Path(quantised["target"]) / "config.json").read_text())
    engine = specguard.load("tiny", backend="mlx", **quantised)
    solution = engine.solve(
        "Mia has 24 shells. Mia sells half of the shells. Then Mia finds 9 more shells. "
        "How many shells does Mia have?"
    )
    assert solution.answer == "21"
    assert solution.target == quantised["target"]
    assert not solution.is_calibrated  # the bounds are of the unquantised pair


def test_a_quantised_folder_is_refused_by_torch(quantised: dict[str, str]) -> None:
    from specguard.backends.pytorch.loading import load_model as load_torch

    with pytest.raises(SpecguardError, match="quantised for MLX"):
        load_torch(quantised["draft"])


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, LLAMA3])
def test_rope_settings_are_those_of_transformers(rope: dict[str, Any], tmp_path: Path) -> None:
    # transformers 5 nests them where mlx-lm's Llama does not look.
    folder = make_checkpoint(tmp_path / "rope", rope_parameters={"rope_theta": 500.0, **rope})
    model = load_model(str(folder))
    prompt = model.tokenizer.encode_prompt(PROBLEM, None, False)
    step = [60, 61, 62, 63]
    [seen] = model.extend([model.start(prompt)], [step])
    with torch.inference_mode():
        logits = eager(folder)(torch.tensor([[*prompt.token_ids, *step]])).logits[0, -5:-1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(step)[:, None])[:, 0]
    np.testing.assert_allclose(seen.token_logprobs, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("Gemma2", {"head_dim": 16, "sliding_window": 8}, "soft-caps"),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            "sliding-window",
        ),
        ("Mistral", {"sliding_window": 8}, "sliding-window"),
        ("Mamba", {}, "ArraysCache"),
        ("StableLm", {}, "changes keys and values"),
        ("OPT", {}, "Model type opt not supported"),
        ("Glm", {"head_dim": 16}, "positions of glm models"),
        (
            "Llama",
            {"rope_parameters": {"rope_theta": 500.0, "rope_type": "dynamic", "factor": 2.0}},
            "dynamic position scaling",
        ),
        (
            "Qwen2",
            {
                "rope_parameters": {
                    "rope_theta": 500.0,
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "attention_factor": 1.5,
                    "original_max_position_embeddings": 128,
                }
            },
            "attention_factor",
        ),
        ("Llama", {"vocab_size": 600}, "has 600 token ids and its tokenizer 964"),
    ],
)
@pytest.mark.parametrize("role", ["draft", "target"])
def test_what_cannot_be_run_is_refused_at_load_by_name(
    family: str, settings: dict[str, Any], reason: str, role: str, tmp_path: Path
) -> None:
    folder = str(make_checkpoint(tmp_path / family, family, **settings))
    models = {"draft": str(TINY / "draft"), "target": str(TINY / "target"), role: folder}
    with pytest.raises(SpecguardError) as caught:
        specguard.load(backend="mlx", **models)
    assert reason in caught.value.message
    assert folder in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("cache", "reason"),
    [("RotatingKVCache", "RotatingKVCache"), ("QuantizedKVCache", "QuantizedKVCache")],
)
def test_caches_that_cannot_be_cut_back_are_refused(
    cache: str, reason: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.models import cache as caches
    from mlx_lm.models import llama

    made = {"RotatingKVCache": lambda: caches.RotatingKVCache(8)}.get(
        cache, caches.QuantizedKVCache
    )
    monkeypatch.setattr(llama.Model, "make_cache", lambda self: [made() for _ in self.layers])
    with pytest.raises(SpecguardError, match=reason):
        load_model(str(checkpoint))


def test_masks_of_a_model_s_own_are_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.models import llama

    monkeypatch.setattr(llama, "create_attention_mask", lambda h, cache=None: None)
    with pytest.raises(SpecguardError, match="attention masks of its own"):
        load_model(str(checkpoint))


def test_other_caches_get_mlx_lm_s_own_attention(checkpoint: Path) -> None:
    from mlx_lm.models import llama

    load_model(str(checkpoint))
    assert llama.scaled_dot_product_attention is not base.scaled_dot_product_attention
    query = mx.random.normal((1, 4, 3, 16))
    key = mx.random.normal((1, 2, 3, 16))
    arguments = {"cache": None, "scale": 0.25, "mask": "causal"}
    ours = llama.scaled_dot_product_attention(query, key, key, **arguments)
    theirs = base.scaled_dot_product_attention(query, key, key, **arguments)
    assert mx.array_equal(ours, theirs)


def test_python_reads_a_token_while_the_next_pass_is_under_way(
    checkpoint: Path, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(checkpoint))
    sequence = model.start(Prompt((5, 40, 41, 60), (1, 3)))
    passes.clear()
    uniforms = np.zeros((1, 2, 4), dtype=np.float32)
    model.propose([sequence], 2, GREEDY, [Boundary("never", frozenset(), 4)], uniforms)
    # The pending token, then one pass ahead of every pair of tokens but the last.
    assert passes == ["run", *["run", "feed", "feed"] * 3, "feed", "feed"]
    # ... and nothing but the pending token's pass is waited for on the way.
    monkeypatch.setattr(mx, "eval", lambda *arrays: pytest.fail("Python waits"))
    model.propose([sequence], 2, GREEDY, [Boundary("never", frozenset(), 4)], uniforms)


@pytest.mark.parametrize("num_candidates", [1, 3])
def test_a_committed_step_is_not_computed_again(
    checkpoint: Path, passes: list[str], num_candidates: int
) -> None:
    model = load_model(str(checkpoint))
    sequence = model.start(Prompt((5, 40, 41, 60), (1, 3)))
    rng = np.random.default_rng(0)
    sampling = Sampling(1.0, 1.0)
    # Every letter ends a step, so all candidates end before the cap.
    boundary = Boundary("a", frozenset(), 200)
    for _ in range(3):
        passes.clear()
        draws = rng.random((1, num_candidates, 200), dtype=np.float32)
        [candidates] = model.propose([sequence], num_candidates, sampling, [boundary], draws)
        assert {candidate.finish for candidate in candidates} == {"delimiter"}
        longest = max(len(candidate.token_ids) for candidate in candidates)
        needs_pending = len(sequence.token_ids) == 4
        assert passes.count("run") == longest + needs_pending
        passes.clear()
        model.commit([sequence], [candidates[-1]])
        assert not passes


def test_candidates_do_not_copy_the_prefix(checkpoint: Path) -> None:
    model = load_model(str(checkpoint))
    sequence = model.start(Prompt(tuple(range(3, 453)), (0, 1)))
    prefix = sum(array.nbytes for array in sequence.readable().arrays())
    peaks = []
    for k in 1, 16:
        uniforms = np.full((1, k, 2), 0.5, dtype=np.float32)
        boundary = Boundary("never", frozenset(), 2)
        model.propose([sequence], k, GREEDY, [boundary], uniforms)  # the buffer grows once
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        model.propose([sequence], k, GREEDY, [boundary], uniforms)
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] - peaks[0] < prefix  # 16 copies would be 15 more


def test_a_fork_costs_nothing_until_one_of_the_two_writes(checkpoint: Path) -> None:
    model = load_model(str(checkpoint))
    sequence = model.start(Prompt(tuple(range(3, 303)), (0, 1)))
    size = sum(array.nbytes for array in sequence.readable().arrays())
    before = mx.get_active_memory()
    forks = [sequence.fork() for _ in range(4)]
    mx.eval([fork.readable().arrays() for fork in forks])
    assert mx.get_active_memory() - before < size
    for fork in forks:
        fork.close()


def test_the_dtype_is_honoured(checkpoint: Path) -> None:
    for name in "float32", "bfloat16", "float16":
        model = load_model(str(checkpoint), dtype=name)
        sequence = model.start(Prompt((5, 6, 7), (0, 1)))
        assert sequence.readable().keys[0].dtype == getattr(mx, name)
    with pytest.raises(SpecguardError, match="unknown dtype 'int3'"):
        load_model(str(checkpoint), dtype="int3")
    with pytest.raises(UsageError, match="one device"):
        specguard.load("tiny", backend="mlx:1")


def test_memory_that_runs_out_is_said_in_one_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(checkpoint))
    engine = Engine(target=model, config=SolveConfig(method="target"))

    def too_much(*arguments: Any) -> Any:
        # As Metal says it; the CPU build dies of it, so nothing large is asked for here.
        raise RuntimeError("[metal::malloc] Attempting to allocate 9000000000 bytes")

    monkeypatch.setattr(Forward, "run", too_much)
    with pytest.raises(SpecguardError, match="memory ran out while") as caught:
        engine.solve(PROBLEM)
    assert "smaller pair" in caught.value.hint
    monkeypatch.setattr(
        "specguard.backends.mlx.loading.psutil.virtual_memory",
        lambda: SimpleNamespace(available=1000),
    )
    with pytest.raises(SpecguardError, match=r"needs 0\.0 GiB and this machine has 0\.0 GiB free"):
        load_model(str(checkpoint))


def test_damaged_weights_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SpecguardError, match="Missing 1 parameters"):
        load_model(str(folder))


def test_half_precision_captures_in_single() -> None:
    """Weights of bfloat16 queries and keys are exact to single precision."""
    from specguard.backends.mlx.attention import RowCapture, captured_attention
    from specguard.core import Capture

    mx.random.seed(0)
    query, key = (
        mx.random.normal(shape).astype(mx.bfloat16) for shape in ((1, 4, 3, 64), (1, 2, 40, 64))
    )
    is_source = np.arange(38) % 2 == 0
    output, (source_mass, sink_mass, step) = captured_attention(
        query, key, key, 0.125, RowCapture.of(Capture(is_source, 1, 0.01), 3, 0)
    )
    assert output.dtype == mx.bfloat16
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
    from specguard.core import Capture

    captured: list[int] = []
    original = attention.captured_attention

    def spy(*arguments: Any) -> Any:
        captured.append(1)
        return original(*arguments)

    monkeypatch.setattr(attention, "captured_attention", spy)
    model = load_model(str(checkpoint))
    model.extend([model.start(Prompt((5, 6, 7), (0, 1)))], [[8, 9]])
    assert not captured
    capture = Capture(np.ones(3, dtype=bool), 2)
    model.extend([model.start(Prompt((5, 6, 7), (0, 1)))], [[8, 9]], [capture])
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


@pytest.mark.parametrize("missing", ["mlx", "mlx_lm"])
def test_a_missing_package_is_said(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "specguard.backends.mlx.backend.find_spec",
        lambda name: None if name == missing else object(),
    )
    with pytest.raises(SpecguardError, match=f"{missing} is not installed") as caught:
        specguard.load("tiny", backend="mlx")
    assert caught.value.hint == "pip install 'specguard[mlx]'"


@pytest.mark.parametrize(("system", "machine"), [("Windows", "AMD64"), ("Darwin", "x86_64")])
def test_another_platform_is_said(
    system: str, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specguard.backends.mlx.backend.platform.system", lambda: system)
    monkeypatch.setattr("specguard.backends.mlx.backend.platform.machine", lambda: machine)
    with pytest.raises(SpecguardError, match=f"this is {system} on {machine}") as caught:
        specguard.load("tiny", backend="mlx")
    assert "--backend cpu" in caught.value.hint


def test_the_status_names_version_device_and_memory() -> None:
    status = MLX.status()
    assert status.is_usable
    assert mx.__version__ in status.version
    assert "mlx-lm" in status.version
    assert status.device
    assert status.memory_bytes


def test_a_verifying_pass_and_plain_probabilities_agree(checkpoint: Path) -> None:
    """A captured layer computes its output in another way: the same log-probs come out."""
    from specguard.core import Capture

    model = load_model(str(checkpoint))
    prompt = model.tokenizer.encode_prompt(PROBLEM, None, False)
    step = [60, 61, 62, 63, 64]
    capture = Capture(np.ones(len(prompt.token_ids), dtype=bool), 4, 0.01)
    [captured] = model.extend([model.start(prompt)], [step], [capture])
    [plain] = model.extend([model.start(prompt)], [step])
    np.testing.assert_allclose(captured.token_logprobs, plain.token_logprobs, atol=1e-5)


def test_solving_restarts_nothing(passes: list[str]) -> None:
    """With the target's verdict alone, a problem costs one target pass a step and the prompt."""
    engine = specguard.load("tiny", backend="mlx")
    passes.clear()
    accepting = VerifierConfig(weights={"log_prob": 1.0}, threshold=0.0)
    solution = engine.solve(PROBLEM, num_candidates=1, verifier=accepting)
    assert solution.stats.num_accepted_steps == solution.stats.num_steps
    # Draft: prompt, pending token, one pass a token. Target: prompt, one pass a step.
    expected = 2 + solution.stats.num_tokens + 1 + solution.stats.num_steps
    assert passes.count("run") == expected


def test_wired_memory_is_what_the_gpu_recommends(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12345})
    monkeypatch.setattr(mx, "set_wired_limit", limits.append)
    load_model(str(checkpoint))
    assert limits == [12345]


def test_a_downloaded_hub_id_is_loaded(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    cache = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(checkpoint, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load_model("owner/name").name == "owner/name"
    with pytest.raises(SpecguardError, match="neither a folder nor a model on this disk") as caught:
        load_model("owner/other")
    assert "specguard models pull owner/other" in caught.value.hint


@pytest.mark.parametrize(
    "settings", [{"method": "sd"}, {"rewrite": "speculate"}, {"num_candidates": 3}]
)
def test_a_batch_goes_from_thread_to_thread(settings: dict[str, Any]) -> None:
    pair = specguard.load("tiny", backend="mlx", **settings)
    texts = [problem.text for problem in islice(problems.stream(problems.HELD_OUT), 4)]
    found = solve_many(pair, texts, batch_size=3)
    answers = {}
    for _ in texts:
        with ThreadPoolExecutor(1) as pool:
            one = pool.submit(next, found).result()
        assert one.solution is not None
        answers[one.index] = one.solution.text
    assert [answers[index] for index in range(4)] == [pair.solve(text).text for text in texts]


def test_a_thread_that_gives_its_streams_back_lets_the_process_end() -> None:
    script = (
        "import threading, specguard, mlx.core as mx\n"
        "pair = specguard.load('tiny', backend='mlx', num_candidates=3)\n"
        "def work():\n"
        f"    print(pair.solve({PROBLEM!r}).answer)\n"
        "    mx.clear_streams()\n"
        "worker = threading.Thread(target=work)\n"
        "worker.start()\n"
        "worker.join()\n"
    )
    for _ in range(2):  # without it, every second process aborts
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.strip() == "12"


@pytest.mark.parametrize("settings", [{"method": "target"}, {"num_candidates": 3}])
def test_compiled_functions_change_no_solution(settings: dict[str, Any]) -> None:
    pair = specguard.load("tiny", backend="mlx", **settings)
    compiled = pair.solve(PROBLEM)
    mx.disable_compile()
    try:
        plain = pair.solve(PROBLEM)
    finally:
        mx.enable_compile()
    assert compiled.text == plain.text
    for one, other in zip(compiled.steps, plain.steps, strict=True):
        assert one.signals == pytest.approx(other.signals, abs=1e-4)

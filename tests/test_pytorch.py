"""What the PyTorch backend runs without capture, what it refuses, and its devices."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import specguard
from specguard.backends.local.drawlog import DrawLog
from specguard.backends.local.layer import Outputs, Row
from specguard.backends.pytorch.kv import KVBuffer
from specguard.backends.pytorch.layer import TorchLayer
from specguard.backends.pytorch.loading import load_model
from specguard.core import (
    Candidate,
    Sampling,
    ScoreJob,
    SolveConfig,
    Solver,
    SpecguardError,
    VerifierConfig,
    ensemble_weights,
)
from tests.conftest import PROBLEM, eager, make_checkpoint
from tests.contract.calls import (
    FLAT,
    PREFIX,
    assert_same,
    capture,
    generate_job,
    run,
    run_together,
    score_job,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("reads_late", [False, True])
def test_what_slides_or_soft_caps_runs_without_capture(reads_late: bool, tmp_path: Path) -> None:
    sliding = make_checkpoint(
        tmp_path / "qwen", "Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2
    )
    capped = make_checkpoint(tmp_path / "gemma", "Gemma2", head_dim=16, sliding_window=8)
    for folder, reason in (sliding, "sliding-window"), (capped, "soft-caps"):
        engine = load_model(str(folder))
        engine.layer.reads_late = reads_late  # type: ignore[misc]
        assert reason in engine.reasons["attention"]
        assert engine.note.startswith("transformers' own layers run it: fused layers ")
        prefix = engine.tokenizer.encode_prompt(PROBLEM, None, False).token_ids
        reference = eager(folder)
        # Of three candidates, each is continued once: their columns lie apart.
        candidates = run(engine, generate_job(engine, prefix, 3, sampling=FLAT))
        for candidate in candidates:
            assert_logprobs(reference, prefix, candidate)
            longer = prefix + candidate.token_ids
            run(engine, generate_job(engine, prefix, 2, sampling=FLAT))
            run(engine, generate_job(engine, prefix, 1, sampling=FLAT, first=2))
            [further] = run(engine, generate_job(engine, longer, 1, sampling=FLAT, seed=1))
            assert_logprobs(reference, longer, further)
        with pytest.raises(SpecguardError, match="cannot be captured"):
            run(engine, score_job([[5]], prefix, capture=capture(prefix)))
        paper = VerifierConfig(weights=ensemble_weights(0.3))
        solver = Solver(engine, engine, SolveConfig(verifier=paper, max_tokens=12))
        with pytest.raises(SpecguardError, match="has no attention"):
            solver.solve(PROBLEM)
        assert Solver(engine, engine).solve(PROBLEM, max_tokens=12).stats.num_tokens > 0


def assert_logprobs(reference: Any, prefix: tuple[int, ...], candidate: Candidate) -> None:
    """They are what transformers makes of the same tokens in one pass."""
    ids = torch.tensor([[*prefix, *candidate.token_ids]])
    n = len(candidate.token_ids)
    with torch.inference_mode():
        logs = reference(ids).logits[0, -n - 1 : -1].log_softmax(-1)
    expected = logs.gather(-1, ids[0, -n:, None]).squeeze(-1).numpy()
    np.testing.assert_allclose(candidate.token_logprobs, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Mamba", {}),
        (
            "Qwen3Next",
            {
                "head_dim": 16,
                "num_experts": 0,
                "layer_types": ["linear_attention", "full_attention"] * 2,
            },
        ),
    ],
)
def test_recurrent_models_are_refused_at_load(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / family, family, **settings)
    with pytest.raises(SpecguardError) as caught:
        load_model(str(folder))
    assert str(folder) in caught.value.message or family in caught.value.message


def test_devices_and_dtypes_are_checked(checkpoint: Path) -> None:
    for settings, message in (
        ({"device": "tpu"}, "no device"),
        ({"dtype": "int3"}, "unknown dtype"),
    ):
        with pytest.raises(SpecguardError, match=message):
            load_model(str(checkpoint), **settings)
    if not torch.cuda.is_available():
        with pytest.raises(SpecguardError, match="no CUDA GPU"):
            load_model(str(checkpoint), device="cuda")
    if not torch.backends.mps.is_available():
        with pytest.raises(SpecguardError, match="no Metal GPU"):
            load_model(str(checkpoint), device="mps")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Llama", {"head_dim": 64}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
        ("Llama", {"max_position_embeddings": 2048, "rope_parameters": LLAMA3}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 64}),
    ],
)
def test_fused_layers_do_what_the_model_s_own_do(
    family: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "model", family, **settings)
    fused = load_model(str(folder))
    assert fused.note == ""
    monkeypatch.setenv("SPECGUARD_REFERENCE", "1")
    own = load_model(str(folder))
    assert "the reference switch is on" in own.note
    jobs = [
        score_job([range(30, 70)], capture=capture(PREFIX, "problem", epsilon=0.0)),
        score_job([[40, 41, 42], [40, 50], [9]]),  # a tree behind what is kept
        score_job([[7, 8]], (*PREFIX, 40, 41)),
    ]
    for job in jobs:
        assert_same(run(fused, job), run(own, job))
    batch = different_lengths(fused.context_limit)
    pairs = zip(run_together(fused, batch), run_together(own, batch), strict=True)
    for found, expected in pairs:
        assert_same(found, expected)


def different_lengths(limit: int) -> list[ScoreJob]:
    """Problems, one of them late in the context."""
    lengths = {"short": 3, "middle": 50, "late": limit - 12}
    return [
        score_job([[60, 61]], tuple(5 + place % 90 for place in range(length)), key=name)
        for name, length in lengths.items()
    ]


@pytest.mark.parametrize("is_blocked", [False, True])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 64}),
    ],
)
def test_fused_layers_run_in_bfloat16(
    family: str,
    settings: dict[str, Any],
    is_blocked: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from specguard.backends.pytorch import matrix

    can_block = matrix._can_block
    monkeypatch.setattr(matrix, "_can_block", lambda weight: is_blocked and can_block(weight))
    if is_blocked and not can_block(torch.zeros(1, dtype=torch.bfloat16)):
        pytest.skip("oneDNN does not multiply in bfloat16 here")
    folder = str(make_checkpoint(tmp_path / "model", family, **settings))
    exact = load_model(folder)
    fused = load_model(folder, dtype="bfloat16")
    assert fused.note == ""
    layers = fused.layer.model.base_model.layers
    assert all((layer.mlp.up_proj.weight.numel() == 0) == is_blocked for layer in layers)
    monkeypatch.setenv("SPECGUARD_REFERENCE", "1")
    own = load_model(folder, dtype="bfloat16")
    deviations = []
    # Few rows behind a context, one, and many.
    for job in (
        score_job([range(30, 70)]),
        score_job([[7]], (*PREFIX, 30, 31)),
        score_job([range(5, 95)], key="long"),
    ):
        [expected], *seen = (run(engine, job) for engine in (exact, fused, own))
        deviations.append(
            [np.abs(one.token_logprobs - expected.token_logprobs).max() for [one] in seen]
        )
    by_fused, by_own = np.max(deviations, axis=0)
    assert 0 < by_fused < 2 * by_own  # as exact as transformers' own layers


@pytest.mark.parametrize("is_refused", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_weights_stay_in_16_bits_where_single_precision_is_computed(
    family: str, is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specguard.backends.pytorch import fused, loading, matrix

    if not matrix.reads_halves():
        pytest.skip("no kernel reads halves here")
    folder = str(make_checkpoint(tmp_path / "model", family, number_type=torch.bfloat16))
    monkeypatch.setenv("SPECGUARD_REFERENCE", "1")
    own = load_model(folder, dtype="float32")
    monkeypatch.delenv("SPECGUARD_REFERENCE")
    monkeypatch.setattr(loading, "_LARGE", 0)
    if is_refused:
        monkeypatch.setattr(fused, "_rotate", lambda states, cos, sin: states)
    halved = load_model(folder, dtype="float32")
    assert bool(halved.note) == is_refused
    assert halved.num_bytes_per_token == own.num_bytes_per_token
    held = sum(weight.nbytes for weight in halved.layer.model.parameters())
    embedding = halved.layer.model.get_input_embeddings().weight
    assert (embedding.dtype == torch.bfloat16) != is_refused
    assert (held < 2 * embedding.nbytes) != is_refused
    for job in (
        score_job([range(30, 70)], capture=capture(PREFIX, "problem", epsilon=0.0)),
        score_job([[40, 41, 42], [40, 50], [9]]),
        score_job([range(5, 95)], key="long"),
    ):
        assert_same(run(halved, job), run(own, job))


@pytest.mark.parametrize(
    ("device", "stored", "size", "computes", "expected"),
    [
        ("cpu", "bfloat16", 10**9, True, torch.bfloat16),
        ("cpu", "bfloat16", 10**9, False, torch.float32),
        ("cpu", "float16", 10**9, True, torch.float32),
        ("cpu", "float32", 10**9, True, torch.float32),
        ("cpu", "bfloat16", 10**6, True, torch.float32),
        ("mps", "bfloat16", 10**9, True, torch.bfloat16),
        ("mps", "bfloat16", 10**9, False, torch.float32),  # in float16 it would overflow
        ("mps", "float16", 10**9, False, torch.float16),
        ("mps", "float32", 10**6, True, torch.float32),
        ("cuda", "float32", 10**6, False, torch.bfloat16),
    ],
)
def test_large_checkpoints_in_bfloat16_stay_so_where_the_device_computes_with_it(
    device: str,
    stored: str,
    size: int,
    computes: bool,
    expected: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from specguard.backends.pytorch import loading

    monkeypatch.setattr(loading, "_computes_bfloat16", lambda device: computes)
    assert loading._dtype("auto", torch.device(device), size, stored) == expected
    assert loading._dtype("float32", torch.device(device), size, stored) == torch.float32


def test_metal_is_asked_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    from specguard.backends.pytorch import loading

    for answer in True, False:
        monkeypatch.setattr(
            torch.backends.mps, "is_macos_or_newer", lambda *version, answer=answer: answer
        )
        assert loading._computes_bfloat16(torch.device("mps")) == answer


def test_a_processor_is_asked_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    from specguard.backends.pytorch import loading

    for is_x86, is_arm in (True, False), (False, True), (False, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda is_x86=is_x86: is_x86)
        capabilities = {"bf16": True} if is_arm else {}
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False
        )
        assert loading._computes_bfloat16(torch.device("cpu")) == (is_x86 or is_arm)


def test_fused_layers_hold_nothing_twice(checkpoint: Path) -> None:
    layer = load_model(str(checkpoint)).layer
    assert isinstance(layer, TorchLayer)
    assert layer._fused is not None
    module = layer.model.base_model.layers[0].self_attn
    assert module.q_proj.weight.data_ptr() == layer._fused._layers[0].qkv.weight.data_ptr()


@pytest.mark.parametrize("spoiled", ["_rotate", "_normed", "late"])
def test_fused_layers_that_differ_are_not_used(
    spoiled: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specguard.backends.pytorch import fused

    if spoiled == "_rotate":
        monkeypatch.setattr(fused, "_rotate", lambda states, cos, sin: states)
    elif spoiled == "_normed":
        monkeypatch.setattr(fused, "_normed", lambda states, norm: states)
    else:  # right but for late positions
        turns = fused.FusedLayers.turns
        monkeypatch.setattr(
            fused.FusedLayers,
            "turns",
            lambda self, end: turns(self, end)[torch.arange(end).clamp(max=300)],
        )
    engine = load_model(str(checkpoint))
    assert engine.note == ("transformers' own layers run it: fused layers come to other logits")


def test_families_without_fused_layers_say_so_once(tmp_path: Path) -> None:
    folder = str(make_checkpoint(tmp_path / "phi", "Phi3", pad_token_id=0))
    solver = specguard.load(draft=folder, target=folder, backend="cpu")
    [note] = [note for note in solver.notes if "own layers" in note]
    assert "this is Phi3ForCausalLM" in note


def test_keys_and_values_are_one_tensor(checkpoint: Path) -> None:
    layer = load_model(str(checkpoint)).layer
    assert isinstance(layer, TorchLayer)
    buffer = layer.new_buffer()
    with layer.computing("model"):
        layer.forward([Row(buffer, 0, 3, 0)], [5, 6, 7], [0, 1, 2], None)
    assert buffer.data is not None
    assert buffer.data.shape[:3] == (4, 2, 2)
    assert buffer.data.shape[4] == 64
    copied: list[Any] = []
    index_select = torch.Tensor.index_select
    with pytest.MonkeyPatch.context() as patch, layer.computing("model"):
        patch.setattr(
            torch.Tensor,
            "index_select",
            lambda self, *rest: copied.append(rest) or index_select(self, *rest),
        )
        buffer.copy_columns(1, [2])
    assert len(copied) == 1  # all layers move in one call


def test_the_cache_goes_by_the_name_that_the_model_knows(checkpoint: Path) -> None:
    layer = load_model(str(checkpoint)).layer
    assert isinstance(layer, TorchLayer)

    class Old(type(layer.model)):  # type: ignore[misc]
        def forward(self, input_ids: Any, past_key_values: Any = None) -> Any: ...

    assert layer._own._cache_argument in ("cache", "past_key_values")
    for kind, name in (type(layer.model), layer._own._cache_argument), (Old, "past_key_values"):
        layer._own.__dict__.pop("_cache_argument", None)
        layer.model.__class__ = kind
        assert layer._own._cache_argument == name


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.8, 0.99, 0.9999])
def test_few_tokens_are_enough_for_top_p(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from specguard.backends.pytorch import sampling

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 400, generator=generator) * torch.tensor(
        [[8.0], [4], [2], [1], [0], [6]]
    )
    found = sampling.warp(logits, Sampling(0.9, top_p))
    monkeypatch.setattr(sampling, "_FEW", 10**9)
    torch.testing.assert_close(found, sampling.warp(logits, Sampling(0.9, top_p)), rtol=0, atol=0)


@given(
    scale=st.sampled_from([0.0, 1.0, 5.0, 30.0]),
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.5]),
    top_p=st.sampled_from([0.1, 0.45, 0.8, 0.99, 1.0]),
    owners=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_sample_is_what_is_drawn_from_the_warped_distribution(
    scale: float, temperature: float, top_p: float, owners: list[int], seed: int
) -> None:
    from specguard.backends.pytorch.sampling import draw, sample, warp

    generator = np.random.default_rng(seed)
    # Whole numbers tie, and peaked rows stand beside flat ones.
    logits = torch.from_numpy(generator.normal(size=(3, 200)).round(1) * [[scale], [scale], [1.0]])
    rows = torch.tensor(owners)
    uniforms = generator.random(len(owners), dtype=np.float32)
    sampling = Sampling(temperature, top_p)
    wanted = draw(warp(logits, sampling)[rows], torch.from_numpy(uniforms))
    assert sample(logits, sampling, uniforms, rows).tolist() == wanted.tolist()
    if len(owners) == 3:
        whole = draw(warp(logits, sampling), torch.from_numpy(uniforms))
        assert sample(logits, sampling, uniforms).tolist() == whole.tolist()


@pytest.mark.parametrize("cached", [1, 150, 2**18])
def test_tokens_are_described_by_the_raw_distribution(
    cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specguard.backends.pytorch import sampling

    monkeypatch.setattr(sampling, "_CACHED", cached)
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) * 5
    logits[2, 3] = float("-inf")  # a token that a model never writes
    logits[4, 9] = 200.0
    token_ids, rows = torch.tensor([1, 3, 9, 0]), torch.tensor([0, 2, 4, 2])
    expected = logits.double().log_softmax(-1)
    entropies = torch.special.entr(expected.exp()).sum(-1)
    found = sampling.describe(logits, token_ids, rows)
    wanted = expected[rows, token_ids], entropies[rows]
    torch.testing.assert_close(found, wanted, check_dtype=False)
    every = torch.arange(7)
    found = sampling.describe(logits, every)
    torch.testing.assert_close(found, (expected[every, every], entropies), check_dtype=False)


def test_tokens_are_described_alike_in_whatever_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = specguard.load("tiny", backend="cpu").draft
    assert engine is not None
    prefix = engine.tokenizer.encode_prompt(PROBLEM, None, False).token_ids
    found = []
    for most in 0, 5000, 2**20:
        engine.layer.most_waiting_logits = most  # type: ignore[attr-defined]
        # One ends early: what is left is of the other alone.
        jobs = [
            generate_job(engine, prefix, 3, 5, Sampling(1.5, 1.0), key=0, hidden_states=True),
            generate_job(engine, prefix[:-2], 3, 12, Sampling(1.5, 1.0), key=1, hidden_states=True),
        ]
        found.append([each for candidates in run_together(engine, jobs) for each in candidates])
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_logits_go_once_their_tokens_are_described(checkpoint: Path) -> None:
    layer = load_model(str(checkpoint)).layer
    layer.most_waiting_logits = 3 * 1000  # type: ignore[misc]
    log = DrawLog(layer, keeps_hidden=True)
    with layer.computing("model"):
        for number in range(9):
            logits = torch.randn(2, 500, generator=torch.Generator().manual_seed(number))
            outputs = Outputs(torch.zeros(2, 4), logits)
            log.add([0, 1], [0, 1], outputs, torch.tensor([1, 2]))
            assert len(log._waiting) <= 3
        drawn = log.take([0, 1], ())
    assert drawn.logprobs.shape == (18,)
    assert not log._waiting
    assert not log._described


def test_a_drawing_that_waits_for_others_holds_no_memory(checkpoint: Path) -> None:
    engine = load_model(str(checkpoint))
    gc.collect()
    num_before = sum(type(each) is KVBuffer for each in gc.get_objects())
    for number in 1, 2:
        jobs = [generate_job(engine, PREFIX, 2, 3, key=key) for key in range(number)]
        run_together(engine, jobs)
        for key in range(number):
            engine.release(key)
        gc.collect()
        assert sum(type(each) is KVBuffer for each in gc.get_objects()) == num_before


def test_keys_may_be_wider_than_values() -> None:
    buffer, other = KVBuffer(2), KVBuffer(2)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 3, 5, 24, generator=generator)
    values = torch.randn(2, 3, 5, 16, generator=generator)
    for layer in range(2):
        buffer.write(layer, 0, keys[layer], values[layer])
    buffer.copy_columns(1, [2, 4])
    other.copy_from(buffer, 3)
    for layer in range(2):
        found_keys, found_values = other.write(layer, 3, keys[layer, :, :1], values[layer, :, :1])
        assert torch.equal(found_keys[0], keys[layer][:, [0, 2, 4, 0]])
        assert torch.equal(found_values[0], values[layer][:, [0, 2, 4, 0]])


def test_what_is_taken_of_outputs_keeps_nothing_else(checkpoint: Path) -> None:
    layer = load_model(str(checkpoint)).layer
    outputs = Outputs(torch.randn(64, 8), torch.randn(64, 100))
    for rows in [3], [3, 5]:
        taken = layer.take(outputs, rows)
        assert torch.equal(taken.logits, outputs.logits[rows])
        assert taken.logits.untyped_storage().nbytes() == len(rows) * 100 * 4

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
from specguard.backends.pytorch.kv import KVBuffer
from specguard.backends.pytorch.loading import load_model
from specguard.core import (
    GREEDY,
    Boundary,
    Capture,
    Engine,
    Prompt,
    Sampling,
    SolveConfig,
    SpecguardError,
    VerifierConfig,
)
from tests.conftest import PROBLEM, eager, make_checkpoint


def test_what_slides_or_soft_caps_runs_without_capture(tmp_path: Path) -> None:
    sliding = make_checkpoint(
        tmp_path / "qwen", "Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2
    )
    capped = make_checkpoint(tmp_path / "gemma", "Gemma2", head_dim=16, sliding_window=8)
    for folder, reason in (sliding, "sliding-window"), (capped, "soft-caps"):
        model = load_model(str(folder))
        assert reason in (model.capture_refusal or "")
        prompt = model.tokenizer.encode_prompt(PROBLEM, None, False)
        sequence = model.start(prompt)
        uniforms = np.random.default_rng(0).random((1, 3, 6), dtype=np.float32)
        boundary = Boundary("\n\n", model.tokenizer.eos_ids, 6)
        [candidates] = model.propose([sequence], 3, Sampling(1.0, 1.0), [boundary], uniforms)
        reference = eager(folder)
        for candidate in candidates:
            ids = torch.tensor([[*prompt.token_ids, *candidate.token_ids]])
            n = len(candidate.token_ids)
            with torch.inference_mode():
                logs = reference(ids).logits[0, -n - 1 : -1].log_softmax(-1)
            expected = logs.gather(-1, ids[0, -n:, None]).squeeze(-1).numpy()
            np.testing.assert_allclose(candidate.token_logprobs, expected, atol=1e-4)
        with pytest.raises(SpecguardError, match="cannot be captured"):
            model.extend([sequence], [[5]], [Capture(np.ones(len(prompt.token_ids), dtype=bool))])
        engine = Engine(model, model, SolveConfig(num_candidates=2, max_tokens=12))
        with pytest.raises(SpecguardError, match="cannot be captured"):
            engine.solve(PROBLEM)
        alone = VerifierConfig(weights={"log_prob": 1.0})
        assert engine.solve(PROBLEM, verifier=alone).stats.num_tokens > 0


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


def test_too_little_memory_is_said_before_loading(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr(
        "specguard.backends.pytorch.loading.psutil.virtual_memory",
        lambda: SimpleNamespace(available=1000),
    )
    with pytest.raises(SpecguardError, match=r"needs 0\.0 GiB and this machine has 0\.0 GiB free"):
        load_model(str(checkpoint))


def test_lean_layers_do_what_the_model_s_own_do(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specguard.backends.pytorch.loading import load_model

    lean = load_model(str(checkpoint))
    monkeypatch.setenv("SPECGUARD_WITHOUT", "lean")
    eager = load_model(str(checkpoint))
    assert lean._forward._lean is not None
    assert eager._forward._lean is None
    prompt = Prompt((5, 40, 41, 60, 61, 62, 7), (1, 5))
    tokens = list(range(30, 70))
    seen = []
    for model in lean, eager:
        sequence = model.start(prompt)
        [first] = model.extend([sequence], [tokens], [Capture(np.arange(7) % 2 == 0, 3, 0.0)])
        seen.append(first)
    ours, theirs = seen
    np.testing.assert_allclose(ours.token_logprobs, theirs.token_logprobs, atol=1e-5)
    assert ours.blocks is not None
    assert theirs.blocks is not None
    for block, wanted in zip(ours.blocks, theirs.blocks, strict=True):
        np.testing.assert_allclose(block.source_mass, wanted.source_mass, atol=1e-5)
        np.testing.assert_allclose(block.step, wanted.step, atol=1e-5)
    # Nothing is held twice: the modules see the weights that the lean layers use.
    layer = lean._forward.model.base_model.layers[0].self_attn
    fused = lean._forward._lean._layers[0].qkv
    assert layer.q_proj.weight.data_ptr() == fused.data_ptr()


def test_lean_layers_that_differ_are_not_used(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specguard.backends.pytorch import lean
    from specguard.backends.pytorch.loading import load_model

    monkeypatch.setattr(lean, "_rotate", lambda states, cos, sin: states)
    assert load_model(str(checkpoint))._forward._lean is None


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


def test_tokens_are_described_alike_in_whatever_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    from specguard.backends.pytorch import trail

    draft = specguard.load("tiny", backend="cpu").draft
    assert draft is not None
    prompt = draft.tokenizer.encode_prompt(PROBLEM, None, False)
    uniforms = np.random.default_rng(0).random((2, 3, 12), dtype=np.float32)
    found = []
    for most in 0, 5000, 2**20:
        monkeypatch.setattr(trail, "_MOST_LOGITS", most)
        drafting = draft.drafting(3, Sampling(1.5, 1.0))
        sequences = [draft.start(prompt), draft.start(Prompt(prompt.token_ids[:-2], (0, 1)))]
        for sequence, draws, cap in zip(sequences, uniforms, (5, 12), strict=True):
            drafting.add(sequence, Boundary("", frozenset(), cap), draws[:, :cap])
        # One leaves early: what is left is of the other alone.
        done = dict(drafting.run(1)) | dict(drafting.run(1))
        found.append([one for sequence in sequences for one in done[sequence]])
    for candidates in zip(*found, strict=True):
        for one in candidates[1:]:
            assert one.token_ids == candidates[0].token_ids
            for name in "token_logprobs", "token_entropies", "embedding":
                expected = getattr(candidates[0], name)
                np.testing.assert_allclose(getattr(one, name), expected, rtol=0, atol=1e-6)


def test_logits_go_once_their_tokens_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    from specguard.backends.pytorch import trail

    passes = trail.Trail()
    monkeypatch.setattr(trail, "_MOST_LOGITS", 3 * 1000)
    for number in range(9):
        # A cut of a padded vocabulary, whose storage is that of the whole.
        logits = torch.randn(2, 500, generator=torch.Generator().manual_seed(number))[:, :-1]
        passes.add([0, 1], [0, 1], torch.tensor([1, 2]), logits, torch.zeros(2, 4), None)
        assert num_held(passes) <= 3
    _, logprobs, _, _ = passes.take([0, 1], 0)
    assert logprobs.shape == (18,)
    assert num_held(passes) == 0


def num_held(passes: Any) -> float:
    """How many passes' logits are in memory."""
    return sum(logits.untyped_storage().nbytes() for logits in passes._logits) / 4000


def test_a_drafting_that_waits_for_others_to_join_holds_no_memory() -> None:
    draft = specguard.load("tiny", backend="cpu").draft
    assert draft is not None
    drafting = draft.drafting(1, GREEDY)
    gc.collect()
    num_before = sum(type(one) is KVBuffer for one in gc.get_objects())
    for number in 1, 2:
        sequences = [draft.start(Prompt((5, 6, 7 + index), (0, 1))) for index in range(number)]
        for sequence in sequences:
            cut = Boundary("", frozenset(), 3)
            drafting.add(sequence, cut, np.zeros((1, 3), dtype=np.float32))
        assert len(drafting.run(number)) == number
        for sequence in sequences:
            sequence.close()
        del sequences, sequence
        gc.collect()
        assert sum(type(one) is KVBuffer for one in gc.get_objects()) == num_before

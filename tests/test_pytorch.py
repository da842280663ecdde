"""The PyTorch backend against transformers itself, and the models that it refuses."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from specguard.backends.pytorch import load_model
from specguard.core import (
    GREEDY,
    Boundary,
    Capture,
    Engine,
    Prompt,
    Sampling,
    SolveConfig,
    SpecguardError,
    UsageError,
    VerifierConfig,
)
from specguard.core.grounding import grounding
from tests.conftest import make_checkpoint
from tests.rollout import block_of, full_rollout

PROBLEM = "Mia has 24 shells. Mia sells half of the shells. How many shells does Mia have?"


def eager(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("sources", ["problem", "context"])
@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.2])
def test_blocks_are_those_of_eager_attention(
    checkpoint: Path, sources: str, epsilon: float
) -> None:
    model = load_model(str(checkpoint))
    prompt = model.tokenizer.encode_prompt(PROBLEM, None, False)
    sequence = model.start(prompt)
    model.extend([sequence], [[50, 51, 52]])
    context, n = len(sequence.token_ids), 5
    is_source = np.ones(context, dtype=bool)
    if sources == "problem":
        is_source[:] = False
        is_source[slice(*prompt.problem_span)] = True
    step = [60, 61, 62, 63, 64]
    [seen] = model.extend([sequence], [step], [Capture(is_source, 3, epsilon)])
    with torch.inference_mode():
        output = eager(checkpoint)(torch.tensor([sequence.token_ids[:-1]]), output_attentions=True)
    layers = [layer[0].double().numpy() for layer in output.attentions[-3:]]
    assert seen.blocks is not None
    for block, weights in zip(seen.blocks, layers, strict=True):
        expected = block_of(weights, is_source, n, epsilon)
        np.testing.assert_allclose(block.source_mass, expected.source_mass, atol=1e-5)
        np.testing.assert_allclose(block.sink_mass, expected.sink_mass, atol=1e-5)
        np.testing.assert_allclose(block.step, expected.step, atol=1e-5)
    mass = grounding(seen.blocks, bool(is_source[-1]), 0.5)
    np.testing.assert_allclose(mass, full_rollout(layers, is_source, n, epsilon, 0.5), atol=1e-5)


def test_blocks_of_a_batch_are_those_of_its_rows(checkpoint: Path) -> None:
    model = load_model(str(checkpoint))
    prompts = [Prompt((5, 40, 41, 60, 61, 62), (1, 5)), Prompt((5, 90, 33), (1, 3))]
    steps = [[50, 51], [52, 53, 54, 55]]
    captures = [
        Capture(np.arange(len(prompt.token_ids)) % 2 == parity, 2, 0.01)
        for parity, prompt in enumerate(prompts)
    ]
    together = model.extend([model.start(prompt) for prompt in prompts], steps, captures)
    for prompt, step, capture, seen in zip(prompts, steps, captures, together, strict=True):
        [alone] = model.extend([model.start(prompt)], [step], [capture])
        assert seen.blocks is not None
        assert alone.blocks is not None
        for ours, expected in zip(seen.blocks, alone.blocks, strict=True):
            np.testing.assert_allclose(ours.step, expected.step, atol=1e-5)
            np.testing.assert_allclose(ours.source_mass, expected.source_mass, atol=1e-5)
            np.testing.assert_allclose(ours.sink_mass, expected.sink_mass, atol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Phi3", "Granite"])
def test_greedy_decoding_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / family, family)
    model = load_model(str(folder))
    solution = Engine(target=model).solve(
        PROBLEM, method="target", max_tokens=60, max_step_tokens=11, detail=True
    )
    prompt = model.tokenizer.encode_prompt(PROBLEM, None, False)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).generate(
        torch.tensor([prompt.token_ids]),
        attention_mask=torch.ones(1, len(prompt.token_ids), dtype=torch.long),
        max_new_tokens=60,
        do_sample=False,
    )[0, len(prompt.token_ids) :]
    ours = [i for step in solution.steps for i in step.tokens.token_ids]  # type: ignore[union-attr]
    assert ours == theirs.tolist()[: len(ours)]
    assert len(ours) == 60 or solution.finish_reason in ("eos", "repetition")


def test_log_probs_are_those_of_a_full_pass(checkpoint: Path) -> None:
    model = load_model(str(checkpoint))
    sequence = model.start(model.tokenizer.encode_prompt(PROBLEM, None, False))
    boundary = Boundary("\n\n", model.tokenizer.eos_ids, 12)
    rng = np.random.default_rng(0)
    uniforms = rng.random((1, 5, 12), dtype=np.float32)
    [candidates] = model.propose([sequence], 5, Sampling(1.0, 0.9), boundary, uniforms)
    reference = eager(checkpoint)
    for candidate in candidates:
        ids = torch.tensor([[*sequence.token_ids, *candidate.token_ids]])
        with torch.inference_mode():
            output = reference(ids, output_hidden_states=True)
        n = len(candidate.token_ids)
        logs = output.logits[0, -n - 1 : -1].log_softmax(-1)
        expected = logs.gather(-1, ids[0, -n:, None]).squeeze(-1).numpy()
        np.testing.assert_allclose(candidate.token_logprobs, expected, atol=1e-4)
        entropies = -(logs.exp() * logs).sum(-1).numpy()
        np.testing.assert_allclose(candidate.token_entropies, entropies, atol=1e-4)
        states = output.hidden_states[-1][0, -n - 1 : -1].mean(0).numpy()
        np.testing.assert_allclose(candidate.embedding, states, atol=1e-4)


def test_candidates_share_one_copy_of_the_prefix(checkpoint: Path) -> None:
    model = load_model(str(checkpoint))
    sequence = model.start(Prompt(tuple(range(3, 303)), (0, 1)))
    boundary = Boundary("\n\n", frozenset(), 2)
    sizes = []
    for k in 1, 16:
        uniforms = np.full((1, k, 2), 0.5, dtype=np.float32)
        model.propose([sequence], k, GREEDY, boundary, uniforms)
        sizes.append(sum(key.numel() for key in sequence.readable().keys if key is not None))
    assert sizes[0] == sizes[1]


def test_speculative_sampling_keeps_the_target_s_distribution(tmp_path: Path) -> None:
    """Chi-square over two tokens of a vocabulary of 8, against exact enumeration."""
    from scipy import stats
    from transformers import LlamaConfig, LlamaForCausalLM

    from specguard.backends.pytorch.forward import Forward
    from specguard.backends.pytorch.model import TorchModel
    from tests.scripted import CharTokenizer

    def model(seed: int) -> TorchModel:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=16,
            max_position_embeddings=64,
            initializer_range=0.6,
            attn_implementation="specguard",
        )
        forward = Forward(LlamaForCausalLM(config), "small", 8)
        return TorchModel("small", forward, CharTokenizer(), 64)

    draft, target, sampling = model(1), model(2), Sampling(1.3, 0.9)
    prompt = Prompt((1, 2, 3), (0, 3))
    boundary = Boundary("never", frozenset(), 1)
    rng = np.random.default_rng(0)
    batch, counts = 500, np.zeros((8, 8))
    for _ in range(8):
        guessers = [draft.start(prompt) for _ in range(batch)]
        judges = [target.start(prompt) for _ in range(batch)]
        draws = rng.random((batch, 1, 1), dtype=np.float32)
        guesses = [
            found[0] for found in draft.propose(guessers, 1, sampling, boundary, draws, True)
        ]
        outcomes = target.accept(judges, guesses, sampling, rng.random((batch, 2)))
        short = [
            judge for judge, seen in zip(judges, outcomes, strict=True) if len(seen.token_ids) < 2
        ]
        if short:
            draws = rng.random((len(short), 1, 1), dtype=np.float32)
            rest = target.propose(short, 1, sampling, boundary, draws)
            target.commit(short, [found[0] for found in rest])
        for judge in judges:
            counts[judge.token_ids[3], judge.token_ids[4]] += 1
    expected = np.zeros((8, 8))
    from specguard.backends.pytorch.sampling import warp

    def exact(token_ids: list[int]) -> Any:
        with torch.inference_mode():
            logits = target._forward.model(torch.tensor([token_ids])).logits[:, -1]
        return warp(logits, sampling)[0].double().numpy()

    first = exact([1, 2, 3])
    for token in range(8):
        expected[token] = first[token] * exact([1, 2, 3, token])
    is_possible = expected > 0
    assert counts[~is_possible].sum() == 0
    expected *= counts.sum() / expected.sum()
    assert stats.chisquare(counts[is_possible], expected[is_possible]).pvalue > 1e-3


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
        [candidates] = model.propose([sequence], 3, Sampling(1.0, 1.0), boundary, uniforms)
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


def test_the_context_window_is_kept(checkpoint: Path) -> None:
    model = load_model(str(checkpoint))
    assert model.context_limit == 512
    sequence = model.start(Prompt((5,) * 510, (0, 1)))
    model.extend([sequence], [[6, 7]])
    with pytest.raises(SpecguardError, match="do not fit the context window of 512"):
        model.extend([sequence], [[8]])
    with pytest.raises(SpecguardError, match="do not fit"):
        model.start(Prompt((5,) * 513, (0, 1)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_works(checkpoint: Path, dtype: str) -> None:
    model = load_model(str(checkpoint), dtype=dtype)
    engine = Engine(model, model, SolveConfig(num_candidates=2, max_tokens=24))
    solution = engine.solve(PROBLEM, detail=True)
    assert np.isfinite(list(solution.steps[0].signals.values())).all()


def test_more_layers_than_the_model_has_are_refused(checkpoint: Path) -> None:
    model = load_model(str(checkpoint))
    sequence = model.start(Prompt((5, 6, 7), (0, 3)))
    with pytest.raises(UsageError, match="attention of 5 layers is asked for"):
        model.extend([sequence], [[8]], [Capture(np.ones(3, dtype=bool), 5)])


def test_weights_that_are_not_finite_are_said(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_model(str(folder))
    for sampling in GREEDY, Sampling(1.0, 0.9):
        with pytest.raises(SpecguardError, match="not finite"):
            Engine(target=model).solve(PROBLEM, method="target", sampling=sampling, max_tokens=5)


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

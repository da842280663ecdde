"""Every built-in backend against transformers itself: attention, decoding, probabilities."""

import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import specguard
from specguard.backends.measure import decided
from specguard.core import (
    GREEDY,
    Boundary,
    Capture,
    Engine,
    LanguageModel,
    Prompt,
    Sampling,
    SolveConfig,
    SpecguardError,
    UsageError,
)
from specguard.core.grounding import grounding
from specguard.models.tiny import problems
from tests.conftest import PROBLEM, eager, make_checkpoint
from tests.reference import warp
from tests.rollout import block_of, full_rollout
from tests.scripted import CharTokenizer

Load = Callable[..., LanguageModel[Any]]
SmallModel = Callable[[Path], Any]


@pytest.fixture(params=["torch", "mlx"])
def load(request: pytest.FixtureRequest) -> Load:
    """``load_model`` of a backend."""
    if request.param == "mlx":
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
        from specguard.backends.mlx.loading import load_model as load_mlx

        return load_mlx
    from specguard.backends.pytorch.loading import load_model as load_torch

    return load_torch


@pytest.fixture(params=["torch", "mlx"])
def small_model(request: pytest.FixtureRequest) -> SmallModel:
    """A backend's model over a checkpoint whose vocabulary is too small for its tokenizer."""

    def torch_model(folder: Path) -> Any:
        from specguard.backends.pytorch.attention import ATTENTION_NAME, register
        from specguard.backends.pytorch.forward import Forward
        from specguard.backends.pytorch.model import TorchModel

        register()
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=ATTENTION_NAME
        )
        return TorchModel("small", Forward(model, "small", 8), CharTokenizer(), 64)

    def mlx_model(folder: Path) -> Any:
        from mlx_lm.utils import load_model

        from specguard.backends.mlx.forward import Forward
        from specguard.backends.mlx.model import MlxModel

        return MlxModel("small", Forward(load_model(folder)[0], "small", 8), CharTokenizer(), 64)

    if request.param == "mlx":
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
        return mlx_model
    return torch_model


@pytest.mark.parametrize("sources", ["problem", "context"])
@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.2])
def test_blocks_are_those_of_eager_attention(
    load: Load, checkpoint: Path, sources: str, epsilon: float
) -> None:
    model = load(str(checkpoint))
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


def test_blocks_of_a_batch_are_those_of_its_rows(load: Load, checkpoint: Path) -> None:
    model = load(str(checkpoint))
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
def test_greedy_decoding_is_that_of_transformers(load: Load, family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / family, family)
    model = load(str(folder))
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


def test_log_probs_are_those_of_a_full_pass(load: Load, checkpoint: Path) -> None:
    model = load(str(checkpoint))
    sequence = model.start(model.tokenizer.encode_prompt(PROBLEM, None, False))
    boundary = Boundary("\n\n", model.tokenizer.eos_ids, 12)
    rng = np.random.default_rng(0)
    uniforms = rng.random((1, 5, 12), dtype=np.float32)
    [candidates] = model.propose([sequence], 5, Sampling(1.0, 0.9), [boundary], uniforms)
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


def test_candidates_share_one_copy_of_the_prefix(load: Load, checkpoint: Path) -> None:
    model = load(str(checkpoint))
    sequence = model.start(Prompt(tuple(range(3, 303)), (0, 1)))
    boundary = Boundary("\n\n", frozenset(), 2)
    sizes = []
    for k in 1, 16:
        uniforms = np.full((1, k, 2), 0.5, dtype=np.float32)
        model.propose([sequence], k, GREEDY, [boundary], uniforms)
        sizes.append(sum(key.nbytes for key in sequence.readable().keys if key is not None))
    assert sizes[0] == sizes[1]


def test_speculative_sampling_keeps_the_target_s_distribution(
    small_model: SmallModel, tmp_path: Path
) -> None:
    """Chi-square over two tokens of a vocabulary of 8, against exact enumeration."""
    from scipy import stats

    def folder(seed: int) -> Path:
        return make_checkpoint(
            tmp_path / str(seed),
            seed=seed,
            vocab_size=8,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            initializer_range=0.6,
            eos_token_id=None,
            pad_token_id=None,
        )

    draft, target = small_model(folder(1)), small_model(folder(2))
    sampling = Sampling(1.3, 0.9)
    prompt = Prompt((1, 2, 3), (0, 3))
    boundary = Boundary("never", frozenset(), 1)
    rng = np.random.default_rng(0)
    batch, counts = 500, np.zeros((8, 8))
    for _ in range(8):
        guessers = [draft.start(prompt) for _ in range(batch)]
        judges = [target.start(prompt) for _ in range(batch)]
        draws = rng.random((batch, 1, 1), dtype=np.float32)
        cuts = [boundary] * batch
        guesses = [found[0] for found in draft.propose(guessers, 1, sampling, cuts, draws, True)]
        outcomes = target.accept(judges, guesses, sampling, rng.random((batch, 2)))
        short = [
            judge for judge, seen in zip(judges, outcomes, strict=True) if len(seen.token_ids) < 2
        ]
        if short:
            draws = rng.random((len(short), 1, 1), dtype=np.float32)
            rest = target.propose(short, 1, sampling, [boundary] * len(short), draws)
            target.commit(short, [found[0] for found in rest])
        for judge in judges:
            counts[judge.token_ids[3], judge.token_ids[4]] += 1
    expected = np.zeros((8, 8))
    reference = eager(folder(2))

    def exact(token_ids: list[int]) -> Any:
        with torch.inference_mode():
            logits = reference(torch.tensor([token_ids])).logits[0, -1]
        return warp(logits.double().numpy(), sampling)

    first = exact([1, 2, 3])
    for token in range(8):
        expected[token] = first[token] * exact([1, 2, 3, token])
    is_possible = expected > 0
    assert counts[~is_possible].sum() == 0
    expected *= counts.sum() / expected.sum()
    assert stats.chisquare(counts[is_possible], expected[is_possible]).pvalue > 1e-3


def test_the_context_window_is_kept(load: Load, checkpoint: Path) -> None:
    model = load(str(checkpoint))
    assert model.context_limit == 512
    sequence = model.start(Prompt((5,) * 510, (0, 1)))
    model.extend([sequence], [[6, 7]])
    with pytest.raises(SpecguardError, match="do not fit the context window of 512"):
        model.extend([sequence], [[8]])
    with pytest.raises(SpecguardError, match="do not fit"):
        model.start(Prompt((5,) * 513, (0, 1)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_works(load: Load, checkpoint: Path, dtype: str) -> None:
    model = load(str(checkpoint), dtype=dtype)
    engine = Engine(model, model, SolveConfig(num_candidates=2, max_tokens=24))
    solution = engine.solve(PROBLEM, detail=True)
    assert np.isfinite(list(solution.steps[0].signals.values())).all()


def test_more_layers_than_the_model_has_are_refused(load: Load, checkpoint: Path) -> None:
    model = load(str(checkpoint))
    sequence = model.start(Prompt((5, 6, 7), (0, 3)))
    with pytest.raises(UsageError, match="attention of 5 layers is asked for"):
        model.extend([sequence], [[8]], [Capture(np.ones(3, dtype=bool), 5)])


def test_weights_that_are_not_finite_are_said(load: Load, checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(str(folder))
    for sampling in GREEDY, Sampling(1.0, 0.9):
        with pytest.raises(SpecguardError, match="not finite"):
            Engine(target=model).solve(PROBLEM, method="target", sampling=sampling, max_tokens=5)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [None, GREEDY])
def test_backends_write_the_same_solutions(sampling: Sampling | None) -> None:
    """Every token, decision and finish reason, on problems that no model was trained on."""
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    engines = [specguard.load("tiny", backend=name) for name in ("cpu", "mlx")]
    settings = {} if sampling is None else {"sampling": sampling}
    for problem in islice(problems.stream(problems.HELD_OUT), 6):
        torch_s, mlx_s = (engine.solve(problem.text, detail=True, **settings) for engine in engines)
        assert decided(torch_s) == decided(mlx_s)

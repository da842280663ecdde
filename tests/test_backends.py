"""Every built-in backend against transformers itself: attention, decoding, probabilities."""

import asyncio
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import specguard
from specguard.backends.local.engine import LocalEngine
from specguard.core import (
    GREEDY,
    Boundary,
    Candidate,
    Capture,
    GenerateJob,
    Observation,
    Sampling,
    ScoreJob,
    Solution,
    SolveConfig,
    Solver,
)
from specguard.core.engine import FloatArray
from specguard.core.grounding import grounding
from specguard.models.tiny import problems
from tests.conftest import PROBLEM, eager, make_checkpoint
from tests.reference import warp
from tests.rollout import block_of, full_rollout

Load = Callable[..., LocalEngine]
SPREAD = Sampling(1.0, 0.9)


@pytest.fixture(params=["torch", "mlx"])
def load(request: pytest.FixtureRequest) -> Load:
    """``load_model`` of a backend."""
    if request.param == "mlx":
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
        from specguard.backends.mlx.loading import load_model as load_mlx

        return load_mlx
    from specguard.backends.pytorch.loading import load_model as load_torch

    return load_torch


def generate(engine: LocalEngine, prefix: tuple[int, ...], uniforms: FloatArray) -> list[Candidate]:
    job = GenerateJob(
        key="problem",
        prefix=prefix,
        sampling=SPREAD,
        boundary=Boundary("\n\n", engine.tokenizer.eos_ids, uniforms.shape[1]),
        num_candidates=len(uniforms),
        uniforms=uniforms,
        hidden_states=True,
        distributions=True,
    )
    return asyncio.run(engine.generate(job))


def score(
    engine: LocalEngine, prefix: tuple[int, ...], step: tuple[int, ...], **more: Any
) -> Observation:
    job = ScoreJob(key="problem", prefix=prefix, continuations=(step,), **more)
    [observation] = asyncio.run(engine.score(job))
    return observation


def prompt_of(engine: LocalEngine) -> tuple[int, ...]:
    return engine.tokenizer.encode_prompt(PROBLEM, None, False).token_ids


@pytest.mark.parametrize("sources", ["problem", "context"])
@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.2])
def test_blocks_are_those_of_eager_attention(
    load: Load, checkpoint: Path, sources: str, epsilon: float
) -> None:
    engine = load(str(checkpoint))
    prompt = engine.tokenizer.encode_prompt(PROBLEM, None, False)
    prefix, step = (*prompt.token_ids, 50, 51, 52), (60, 61, 62, 63, 64)
    is_source = np.ones(len(prefix), dtype=bool)
    if sources == "problem":
        is_source[:] = False
        is_source[slice(*prompt.problem_span)] = True
    seen = score(engine, prefix, step, capture=Capture(is_source, 3, epsilon))
    with torch.inference_mode():
        ids = torch.tensor([(*prefix, *step)[:-1]])
        output = eager(checkpoint)(ids, output_attentions=True)
    layers = [layer[0].double().numpy() for layer in output.attentions[-3:]]
    assert seen.blocks is not None
    for block, weights in zip(seen.blocks, layers, strict=True):
        expected = block_of(weights, is_source, len(step), epsilon)
        np.testing.assert_allclose(block.source_mass, expected.source_mass, atol=1e-5)
        np.testing.assert_allclose(block.sink_mass, expected.sink_mass, atol=1e-5)
        np.testing.assert_allclose(block.step, expected.step, atol=1e-5)
    mass = grounding(seen.blocks, bool(is_source[-1]), 0.5)
    rolled = full_rollout(layers, is_source, len(step), epsilon, 0.5)
    np.testing.assert_allclose(mass, rolled, atol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Phi3", "Granite"])
def test_greedy_decoding_is_that_of_transformers(load: Load, family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / family, family)
    engine = load(str(folder))
    solution = Solver(target=engine).solve(
        PROBLEM, method="target", max_tokens=60, max_step_tokens=11, detail=True
    )
    prompt = prompt_of(engine)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=60,
        do_sample=False,
    )[0, len(prompt) :]
    ours = [i for step in solution.steps for i in step.tokens.token_ids]  # type: ignore[union-attr]
    assert ours == theirs.tolist()[: len(ours)]
    assert len(ours) == 60 or solution.finish_reason in ("eos", "repetition")


def test_what_is_said_of_tokens_is_what_a_full_pass_says(load: Load, checkpoint: Path) -> None:
    engine = load(str(checkpoint))
    prefix = prompt_of(engine)
    uniforms = np.random.default_rng(0).random((5, 12), dtype=np.float32)
    reference = eager(checkpoint)
    for candidate in generate(engine, prefix, uniforms):
        ids = torch.tensor([[*prefix, *candidate.token_ids]])
        with torch.inference_mode():
            output = reference(ids, output_hidden_states=True)
        rows = slice(len(prefix) - 1, -1)
        logits = output.logits[0, rows].double()
        logs = logits.log_softmax(-1)
        expected = logs.gather(-1, ids[0, len(prefix) :, None]).squeeze(-1).numpy()
        entropies = -(logs.exp() * logs).sum(-1).numpy()
        states = output.hidden_states[-1][0, rows].numpy()
        warped = np.array([warp(row, SPREAD) for row in logits.numpy()])
        seen = score(engine, prefix, candidate.token_ids, hidden_state=True, distributions=SPREAD)
        for said in candidate, seen:
            np.testing.assert_allclose(said.token_logprobs, expected, atol=1e-4)
            np.testing.assert_allclose(said.token_entropies, entropies, atol=1e-4)
            assert said.distributions is not None
            np.testing.assert_allclose(said.distributions[: len(warped)], warped, atol=1e-4)
        np.testing.assert_allclose(candidate.embedding, states.mean(0), atol=1e-4)
        np.testing.assert_allclose(seen.hidden_state, states[-1], atol=1e-4)
        choices = logits.argmax(-1).numpy() == candidate.token_ids
        assert seen.is_first_choice.tolist() == choices.tolist()


def test_candidates_share_one_copy_of_the_prefix(load: Load, checkpoint: Path) -> None:
    engine = load(str(checkpoint))
    prefix = tuple(range(3, 303))
    generate(engine, prefix, np.full((1, 2), 0.5, dtype=np.float32))
    alone = num_columns(engine)
    engine.release("problem")
    uniforms = np.linspace(0, 0.99, 32, dtype=np.float32).reshape(16, 2)
    assert len({c.token_ids for c in generate(engine, prefix, uniforms)}) > 8
    assert num_columns(engine) <= alone + 2 * 16


def num_columns(engine: LocalEngine) -> int:
    """Columns in use for the only problem."""
    [kept] = engine._kept.values()
    return kept.num_columns


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_works(load: Load, checkpoint: Path, dtype: str) -> None:
    engine = load(str(checkpoint), dtype=dtype)
    solver = Solver(engine, engine, SolveConfig(num_candidates=2, max_tokens=24))
    solution = solver.solve(PROBLEM, detail=True)
    assert np.isfinite(list(solution.steps[0].signals.values())).all()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"num_candidates": 4}, {"sampling": GREEDY}])
def test_backends_write_the_same_solutions(settings: dict[str, Any]) -> None:
    """Every token, decision and finish reason, on problems that no model was trained on."""
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    names = (("cpu", "cpu"), ("mlx", "mlx"), ("mlx", "cpu"))
    solvers = [specguard.load("tiny", draft_backend=name, backend=other) for name, other in names]
    for problem in islice(problems.stream(problems.HELD_OUT), 6):
        torch_alone, *others = (
            decided(solver.solve(problem.text, detail=True, **settings)) for solver in solvers
        )
        for other in others:
            assert other == torch_alone


def decided(solution: Solution) -> tuple[Any, ...]:
    """All that was decided on the way to a solution, and no score."""
    steps = [
        (
            step.decision,
            step.text,
            step.selected,
            step.tokens.token_ids if step.tokens else (),
            [(candidate.token_ids, candidate.finish) for candidate in step.candidates or ()],
        )
        for step in solution.steps
    ]
    return solution.text, solution.finish_reason, steps

"""Calls that the contract's tests make, and what they compare."""

from typing import Any

import numpy as np

from specguard.core import Boundary, LanguageModel, Prompt, Sampling
from specguard.core.randomness import Purpose, uniforms

Model = LanguageModel[Any]
SAMPLING = Sampling(0.9, 0.95)
PROMPT = Prompt((5, 40, 41, 60, 61, 62, 7), (1, 5))
OTHER_PROMPT = Prompt((5, 90, 33, 34), (1, 3))
TOLERANCE = 1e-4


def boundary(model: Model, cap: int, delimiter: str = "\n\n") -> Boundary:
    return Boundary(delimiter, model.tokenizer.eos_ids, cap)


def draws(k: int, cap: int, seed: int = 0, purpose: Purpose = Purpose.DRAFT) -> Any:
    return uniforms(seed, 0, purpose, 0, k, cap)[np.newaxis]


def propose(
    model: Model, sequence: Any, k: int, cap: int, sampling: Sampling = SAMPLING, **more: Any
) -> Any:
    seed = more.pop("seed", 0)
    [found] = model.propose(
        [sequence], k, sampling, [boundary(model, cap)], draws(k, cap, seed), **more
    )
    return found


def observe(model: Model, prompt: Prompt, token_ids: Any) -> Any:
    sequence = model.start(prompt)
    [seen] = model.extend([sequence], [token_ids])
    sequence.close()
    return seen


def propose_within(model: Model, sequence: Any, cut: Boundary) -> Any:
    [found] = model.propose([sequence], 2, SAMPLING, [cut], draws(2, cut.max_tokens))
    return found


def same(seen: Any, expected: Any) -> None:
    np.testing.assert_allclose(seen.token_logprobs, expected.token_logprobs, atol=TOLERANCE)
    np.testing.assert_allclose(seen.token_entropies, expected.token_entropies, atol=TOLERANCE)
    assert (seen.blocks is None) == (expected.blocks is None)
    for block, wanted in zip(seen.blocks or (), expected.blocks or (), strict=True):
        np.testing.assert_allclose(block.source_mass, wanted.source_mass, atol=1e-5)
        np.testing.assert_allclose(block.sink_mass, wanted.sink_mass, atol=1e-5)
        np.testing.assert_allclose(block.step, wanted.step, atol=1e-5)

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specguard.core.grounding import grounding
from tests.rollout import block_of, full_rollout


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    context=st.integers(1, 12),
    n=st.integers(1, 6),
    num_layers=st.integers(1, 4),
    sources=st.sampled_from(["context", "problem"]),
    epsilon=st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.6]),
    residual=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_blocks_give_the_full_rollout(
    seed: int,
    context: int,
    n: int,
    num_layers: int,
    sources: str,
    epsilon: float,
    residual: float,
) -> None:
    rng = np.random.default_rng(seed)
    width = context + n - 1
    scores = rng.normal(size=(num_layers, 2, width, width)) * rng.choice([0.1, 3.0])
    scores[..., np.triu_indices(width, 1)[0], np.triu_indices(width, 1)[1]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    layers = list(weights / weights.sum(-1, keepdims=True))
    is_source = np.ones(context, dtype=bool)
    if sources == "problem":
        is_source = rng.random(context) < 0.5
    blocks = [block_of(layer, is_source, n, epsilon) for layer in layers]
    expected = full_rollout(layers, is_source, n, epsilon, residual)
    np.testing.assert_allclose(
        grounding(blocks, bool(is_source[-1]), residual), expected, atol=1e-12
    )


def test_grounding_is_bounded_by_the_residual_share() -> None:
    rng = np.random.default_rng(0)
    weights = np.tril(rng.random((3, 2, 9, 9)))
    weights /= weights.sum(-1, keepdims=True)
    blocks = [block_of(layer, np.ones(5, dtype=bool), 5, 0.0) for layer in weights]
    mass = grounding(blocks, True, 0.5)
    assert mass[0] == pytest.approx(1.0)
    assert (mass[1:] <= 1 - 0.5**3 + 1e-12).all()

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specguard.core import (
    AttentionBlock,
    Capture,
    Observation,
    Sampling,
    SolveConfig,
    UsageError,
    VerifierConfig,
    ensemble_weights,
)
from specguard.core.config import PRESETS
from specguard.core.verifier import normalise, verify

UNKNOWN = np.zeros(2, dtype=bool)
SEEN = Observation(np.array([-0.5, -1.5]), UNKNOWN, np.array([0.2, 0.6]))
PIECES = ["so", " 5"]


def test_signals_are_minima_means_and_maxima() -> None:
    block = AttentionBlock(np.array([0.5, 0.25]), np.array([0.1, 0.3]), np.zeros((2, 2)))
    seen = replace(SEEN, blocks=(block,))
    capture = Capture(np.array([True, False]), num_layers=1)
    verdict = verify(seen, capture, 0.8, PIECES, VerifierConfig())
    assert verdict.signals == pytest.approx(
        {
            "log_prob": -1.5,
            "log_prob_mean": -1.0,
            "log_prob_sum": -2.0,
            "log_prob_numbers": -1.5,
            "entropy_mean": 0.4,
            "entropy_max": 0.6,
            "consistency": 0.8,
            "grounding": 0.125,
            "grounding_mean": 0.1875,
            "sink_mass": 0.2,
        }
    )


def test_the_ensemble_is_the_paper_s() -> None:
    bounds = {"log_prob": (-2.0, 0.0), "grounding": (0.0, 0.5)}
    config = VerifierConfig(weights=ensemble_weights(0.3), bounds=bounds)
    block = AttentionBlock(np.array([1.0, 0.5]), np.zeros(2), np.zeros((2, 2)))
    seen = replace(SEEN, blocks=(block,))
    verdict = verify(seen, Capture(np.array([False]), 1), 1.0, PIECES, config)
    assert verdict.scores["ensemble"] == pytest.approx(0.3 * 0.25 + 0.7 * 0.5)
    assert not verdict.is_accepted


def test_the_threshold_itself_is_enough() -> None:
    for threshold, accepted in (0.25, True), (0.2500001, False):
        config = VerifierConfig(
            weights={"log_prob": 1.0}, bounds={"log_prob": (-2.0, 0.0)}, threshold=threshold
        )
        assert verify(SEEN, None, 1.0, PIECES, config).is_accepted == accepted
    perfect = Observation(np.zeros(2), UNKNOWN, np.zeros(2))
    config = VerifierConfig(
        weights={"log_prob": 0.7, "entropy_mean": 0.2, "entropy_max": 0.1}, threshold=1.0
    )
    assert verify(perfect, None, 1.0, PIECES, config).is_accepted


@given(st.floats(-100, 100), st.floats(-5, 5), st.floats(-5, 5))
def test_normalised_signals_lie_in_the_unit_interval(value: float, low: float, high: float) -> None:
    if low == high:
        return
    config = VerifierConfig(bounds={"log_prob": (low, high)})
    assert 0 <= normalise("log_prob", value, config) <= 1


def test_without_bounds_grounding_is_bounded_by_what_the_layers_leave() -> None:
    config = VerifierConfig(num_layers=2, residual=0.6)
    assert normalise("grounding", 1 - 0.6**2, config) == pytest.approx(1.0)
    assert normalise("grounding", 0.32, config) == pytest.approx(0.5)


def test_lower_entropy_scores_higher() -> None:
    config = VerifierConfig()
    assert normalise("entropy_mean", 0.1, config) > normalise("entropy_mean", 1.0, config)


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 1.1},
        {"threshold": float("nan")},
        {"epsilon": -0.1},
        {"residual": 2.0},
        {"num_layers": 0},
        {"model": "judge"},
        {"sources": "web"},
        {"weights": {"vibes": 1.0}},
        {"weights": {"log_prob": 0.4}},
        {"weights": {"log_prob": 1.5, "grounding": -0.5}},
        {"bounds": {"log_prob": (1.0, 1.0)}},
    ],
)
def test_impossible_verifiers_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        VerifierConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "magic"},
        {"num_candidates": 0},
        {"max_tokens": -1},
        {"max_step_tokens": 0},
        {"max_steps": 0},
        {"seed": -1},
        {"delimiter": ""},
        {"delimiter": "。"},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        SolveConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_beta_is_a_share(beta: float) -> None:
    with pytest.raises(UsageError, match="beta"):
        ensemble_weights(beta)


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(-1, 1), (1e-9, 1), (float("nan"), 1), (1, 0), (1, 1.5)]
)
def test_impossible_samplings_are_refused(temperature: float, top_p: float) -> None:
    with pytest.raises(UsageError):
        Sampling(temperature, top_p)


def test_presets_are_configurations() -> None:
    made = {name: VerifierConfig(**changes) for name, changes in PRESETS.items()}  # type: ignore[arg-type]
    assert made["paper"].weights == pytest.approx({"log_prob": 0.3, "grounding": 0.7})
    assert not made["consistency-only"].needs_model
    assert not made["log-prob"].needs_attention
    assert made["grounding"].needs_attention


def test_signals_that_an_engine_does_not_give_are_not_there() -> None:
    bare = Observation(SEEN.token_logprobs, UNKNOWN)
    # A weight of nothing needs nothing.
    config = VerifierConfig(weights={"log_prob": 1.0, "grounding": 0.0, "entropy_max": 0.0})
    assert not config.needs_attention
    verdict = verify(bare, None, 1.0, PIECES, config)
    of_logprobs = {"log_prob", "log_prob_mean", "log_prob_sum", "log_prob_numbers"}
    assert set(verdict.signals) == of_logprobs | {"consistency"}
    assert verdict.token_grounding is None


@pytest.mark.parametrize(
    ("pieces", "expected"), [(["5", "so"], -0.5), ([" = ", "+"], -1.5), (["so", "on"], 0.0)]
)
def test_numbers_and_operators_have_a_signal(pieces: list[str], expected: float) -> None:
    verdict = verify(SEEN, None, 1.0, pieces, VerifierConfig())
    assert verdict.signals["log_prob_numbers"] == expected


def test_the_usual_verifier_forgives_single_words_and_not_many() -> None:
    for logprobs, accepted in ([-4.4, *[0.0] * 9], True), ([-0.5] * 10, False):
        seen = Observation(np.array(logprobs), np.zeros(10, dtype=bool))
        assert verify(seen, None, 1.0, ["so"] * 10, VerifierConfig()).is_accepted == accepted


def test_bounds_are_those_of_one_model() -> None:
    fitted = VerifierConfig(bounds={"log_prob_sum": (-9.0, 0.0)})
    assert fitted.asking("draft") == VerifierConfig("draft")
    assert fitted.asking("target") is fitted


def test_leading_choices_end_with_the_first_that_differs() -> None:
    for choices, count in ([1, 1, 0, 1], 2), ([0, 1, 1, 1], 0), ([1, 1, 1, 1], 4):
        seen = Observation(np.zeros(4), np.array(choices, dtype=bool))
        assert seen.num_leading_choices == count

"""The ensemble verifier: signals of a step, their normalised scores, and the decision."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from specguard.core.config import REWARD, VerifierConfig
from specguard.core.engine import Capture, FloatArray, Observation
from specguard.core.grounding import grounding

_NUMBER = re.compile(r"[\d=+\-*/×÷]")  # noqa: RUF001


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision on a step with the signals (raw) and scores ([0, 1]) that it rests on."""

    is_accepted: bool
    signals: Mapping[str, float]
    scores: Mapping[str, float]
    token_grounding: FloatArray | None = None


def verify(
    observation: Observation,
    capture: Capture | None,
    consistency: float,
    pieces: Sequence[str],
    config: VerifierConfig,
) -> Verdict:
    """Judge a step by the weighted sum of its normalised signals (paper, ensemble verification).

    ``scores["ensemble"]`` is the sum, 1 where nothing is weighed; a step passes from the threshold
    on. ``capture`` is what the observation's attention was read with, None where it was not.
    ``pieces`` are the texts of the n tokens: those with a digit or an operator are numbers.
    """
    logprobs = observation.token_logprobs
    is_number = np.array([bool(_NUMBER.search(piece)) for piece in pieces], dtype=np.bool_)
    signals = {
        "log_prob": float(logprobs.min()),
        "log_prob_mean": float(logprobs.mean()),
        "log_prob_sum": float(logprobs.sum()),
        "log_prob_numbers": float(logprobs[is_number].min(initial=0.0)),
    }
    if observation.token_entropies is not None:
        signals["entropy_mean"] = float(observation.token_entropies.mean())
        signals["entropy_max"] = float(observation.token_entropies.max())
    signals["consistency"] = consistency
    token_grounding = None
    if observation.blocks is not None and capture is not None:
        token_grounding = grounding(
            observation.blocks, bool(capture.is_source[-1]), config.residual
        )
        signals["grounding"] = float(token_grounding.min())
        signals["grounding_mean"] = float(token_grounding.mean())
        sinks = [block.sink_mass.mean() for block in observation.blocks]
        signals["sink_mass"] = float(np.mean(sinks))
    scores = {name: normalise(name, value, config) for name, value in signals.items()}
    weights = {name: weight for name, weight in config.weights.items() if weight > 0}
    ensemble = sum(weights[name] * scores[name] for name in weights) if weights else 1.0
    # Weights are shares of 1 only up to rounding, and a threshold of 1 must be reachable.
    scores["ensemble"] = min(1.0, round(ensemble, 12))
    return Verdict(scores["ensemble"] >= config.threshold, signals, scores, token_grounding)


def by_reward(reward: float, threshold: float) -> Verdict:
    """A process reward model's verdict, as one signal that needs no bounds."""
    scores = {REWARD: reward, "ensemble": reward}
    return Verdict(reward >= threshold, {REWARD: reward}, scores)


def normalise(signal: str, value: float, config: VerifierConfig) -> float:
    """Min-max normalisation to [0, 1] by the pair's bounds, clamped."""
    low, high = config.bounds_of(signal)
    return min(1.0, max(0.0, (value - low) / (high - low)))

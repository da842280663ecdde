"""How well a reward model tells right draft steps from wrong ones, beside the log-probabilities."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sklearn.metrics import brier_score_loss

from recipes.evidence.signals import Sample, auc
from specguard.core import RewardModel
from specguard.core.runner import Runner
from specguard.models.tiny import problems

REWARD = "reward"
THRESHOLD = 0.7  # from which on reward-guided speculative decoding accepts a step


@dataclass(frozen=True, slots=True)
class Quality:
    """Of rewards as probabilities that a step is right.

    ``base_brier`` is the Brier score of always saying the share of right steps.
    """

    accuracy: float
    right_accepted: float
    wrong_accepted: float
    brier: float
    base_brier: float

    @classmethod
    def of(cls, sample: Sample) -> "Quality":
        """Measured on sampled steps with their rewards."""
        rewards, is_right = sample.values[REWARD], sample.is_right
        is_accepted = rewards >= THRESHOLD
        share = float(is_right.mean())
        return cls(
            accuracy=float((is_accepted == is_right).mean()),
            right_accepted=float(is_accepted[is_right].mean()),
            wrong_accepted=float(is_accepted[~is_right].mean()),
            brier=float(brier_score_loss(is_right, rewards)),
            base_brier=share * (1 - share),
        )


def add_rewards(model: RewardModel, stream: int, rows: Iterable[dict[str, Any]]) -> None:
    """Give every candidate of collected draft steps its reward after the right steps before it."""
    by_problem: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_problem.setdefault(row["problem"], []).append(row)
    with Runner() as runner:
        for index, steps in by_problem.items():
            problem = problems.generate(stream, index)
            for row in steps:
                before = problem.steps[: row["step"]]
                for candidate in row["candidates"]:
                    texts = [*before, candidate["text"]]
                    rewards = runner.run(model.rewards(index, problem.text, texts))
                    candidate["signals"][REWARD] = rewards[-1]
            model.release(index)


def areas(sample: Sample, names: Iterable[str]) -> dict[str, tuple[float, dict[str, float]]]:
    """AUC of each signal, overall and by kind of error."""
    kinds = [kind for kind in dict.fromkeys(sample.errors) if kind is not None]
    parts = {kind: sample.only(kind) for kind in kinds}
    return {
        name: (
            auc(sample.values[name], sample.is_right),
            {kind: auc(part.values[name], part.is_right) for kind, part in parts.items()},
        )
        for name in names
    }

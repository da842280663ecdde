"""From labelled steps to bounds, weights and a threshold, and how good they are."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from specguard.core.config import SIGNALS, VerifierConfig
from specguard.core.errors import SpecguardError
from specguard.core.verifier import normalise

Kind = Literal["beta", "logistic"]
Array = NDArray[np.floating[Any]]
Signals = dict[str, Array]  # values [n] by name

MIN_OF_EACH = 10  # right and wrong steps without which nothing is fitted
_LOG_PROBS = ("log_prob_sum", "log_prob_mean", "log_prob_numbers", "log_prob")
_LOWER_IS_BETTER = ("entropy_mean", "entropy_max", "sink_mass")
_NUM_FOLDS = 5


@dataclass(frozen=True, slots=True)
class Fit:
    """A verifier fitted to all steps, and how such a fit does on steps that it has not seen.

    Everything else is cross-validated over problems, with bounds, weights and threshold fitted anew
    in each fold: ``probabilities`` [n] that a step is right, their ``auc`` and ``brier`` score, and
    the shares ``right_accepted`` and ``wrong_accepted``.
    """

    verifier: VerifierConfig
    num_steps: int
    num_right: int
    auc: float
    brier: float
    right_accepted: float
    wrong_accepted: float
    probabilities: Array
    labels: NDArray[np.bool_]


def fit(
    rows: Sequence[dict[str, Any]], base: VerifierConfig, kind: Kind, accept_wrong: float
) -> Fit:
    """Fit bounds and weights to labelled steps, and the threshold to a wanted trade-off.

    Bounds are the 5% and 95% quantiles of each signal. ``beta`` chooses by AUC a reduction of the
    log-probabilities, and the weight between it and another one, or grounding; ``logistic`` weighs
    every signal by a logistic regression on the normalised scores, signals that speak against a
    step being right left out.

    Args:
        rows: steps with "problem", "is_right" and "signals".
        base: the settings that are not fitted.
        kind: what is fitted.
        accept_wrong: largest share of the wrong steps that may pass.

    Raises:
        SpecguardError: fewer than `MIN_OF_EACH` right or wrong steps, or all of one problem.
    """
    labels = np.array([bool(row["is_right"]) for row in rows])
    num_right = int(labels.sum())
    if min(num_right, len(labels) - num_right) < MIN_OF_EACH:
        raise SpecguardError(
            f"{num_right} right and {len(labels) - num_right} wrong steps are too few to fit to",
            f"{MIN_OF_EACH} of each are needed: give more problems, harder or easier ones",
        )
    names = [name for name in SIGNALS if all(name in row["signals"] for row in rows)]
    signals = {name: np.array([row["signals"][name] for row in rows]) for name in names}
    groups = np.array([row["problem"] for row in rows])
    probabilities, passes = _cross_validated(signals, labels, groups, base, kind, accept_wrong)
    return Fit(
        verifier=_fitted(signals, labels, base, kind, accept_wrong),
        num_steps=len(labels),
        num_right=num_right,
        auc=float(roc_auc_score(labels, probabilities)),
        brier=float(brier_score_loss(labels, probabilities)),
        right_accepted=float(passes[labels].mean()),
        wrong_accepted=float(passes[~labels].mean()),
        probabilities=probabilities,
        labels=labels,
    )


def _cross_validated(
    signals: Signals,
    labels: NDArray[np.bool_],
    groups: NDArray[Any],
    base: VerifierConfig,
    kind: Kind,
    accept_wrong: float,
) -> tuple[Array, NDArray[np.bool_]]:
    """Of each step, by a fit to other problems: how probably it is right, and whether it passes."""
    num_problems = len(set(groups.tolist()))
    if num_problems < 2:
        raise SpecguardError("all steps are of one problem", "give more problems")
    # Shuffled, so that no fold is all of the easy problems that come first.
    folds = StratifiedGroupKFold(min(_NUM_FOLDS, num_problems), shuffle=True, random_state=0)
    probabilities = np.full(len(labels), labels.mean())
    passes = np.zeros(len(labels), dtype=np.bool_)
    for known, unseen in folds.split(labels, labels, groups):
        if len(set(labels[known].tolist())) < 2:  # nothing can be told apart by these
            continue
        verifier = _fitted(_rows(signals, known), labels[known], base, kind, accept_wrong)
        inputs, others = (_inputs(_rows(signals, part), verifier, kind) for part in (known, unseen))
        model = LogisticRegression().fit(inputs, labels[known])
        probabilities[unseen] = model.predict_proba(others)[:, 1]
        passes[unseen] = _ensemble(_rows(signals, unseen), verifier) >= verifier.threshold
    return probabilities, passes


def _fitted(
    signals: Signals,
    labels: NDArray[np.bool_],
    base: VerifierConfig,
    kind: Kind,
    accept_wrong: float,
) -> VerifierConfig:
    bounds = {}
    for name, values in signals.items():
        low, high = np.quantile(values, [0.05, 0.95])
        if high > low:
            ends = (high, low) if name in _LOWER_IS_BETTER else (low, high)
            bounds[name] = (float(ends[0]), float(ends[1]))
    verifier = replace(base, bounds=bounds)
    scores = _scores({name: signals[name] for name in bounds}, verifier)
    weights = _best_beta(scores, labels) if kind == "beta" else _logistic(scores, labels)
    verifier = replace(verifier, weights=weights)
    threshold = _threshold(_ensemble(signals, verifier), labels, accept_wrong)
    return replace(verifier, threshold=threshold)


def _rows(signals: Signals, rows: NDArray[np.integer]) -> Signals:
    return {name: values[rows] for name, values in signals.items()}


def _scores(signals: Signals, verifier: VerifierConfig) -> Signals:
    return {
        name: np.array([normalise(name, value, verifier) for value in values])
        for name, values in signals.items()
    }


def _ensemble(signals: Signals, verifier: VerifierConfig) -> Array:
    scores = _scores({name: signals[name] for name in verifier.weights}, verifier)
    total = sum(weight * scores[name] for name, weight in verifier.weights.items())
    return np.asarray(np.round(total, 12))


def _inputs(signals: Signals, verifier: VerifierConfig, kind: Kind) -> Array:
    """What a probability is worked out from: the ensemble score, or the score of each signal."""
    if kind == "beta":
        return _ensemble(signals, verifier)[:, None]
    scores = _scores({name: signals[name] for name in verifier.weights}, verifier)
    return np.stack(list(scores.values()), axis=1)


def _best_beta(scores: dict[str, Array], labels: NDArray[np.bool_]) -> dict[str, float]:
    """Weights of one reduction of the log-probabilities and of another one, or of grounding."""
    reductions = [name for name in _LOG_PROBS if name in scores]
    pairs = [*combinations(reductions, 2), *product(reductions, {"grounding"} & scores.keys())]
    none = np.zeros(len(labels))

    def area(choice: tuple[str, str, float]) -> tuple[float, float, bool]:
        name, other, beta = choice
        ensemble = beta * scores[name] + (1 - beta) * scores.get(other, none)
        # Of equal ones the larger beta, and log-probability: it asks for no captured attention.
        return round(float(roc_auc_score(labels, ensemble)), 6), beta, other != "grounding"

    betas = np.round(np.linspace(0, 1, 11), 1).tolist()
    choices = [(name, other, beta) for name, other in pairs for beta in betas]
    name, other, beta = max(choices or [(reductions[0], "", 1.0)], key=area)
    weights = {name: beta, other: round(1 - beta, 1)}
    return {signal: weight for signal, weight in weights.items() if weight > 0}


def _logistic(scores: dict[str, Array], labels: NDArray[np.bool_]) -> dict[str, float]:
    names = list(scores)
    while True:
        inputs = np.stack([scores[name] for name in names], axis=1)
        found = LogisticRegression().fit(inputs, labels).coef_[0]
        if (found > 0).all() or len(names) == 1:
            break
        names = [name for name, weight in zip(names, found, strict=True) if weight > 0] or [
            next(name for name in _LOG_PROBS if name in scores)
        ]
    if len(names) == 1:
        return {names[0]: 1.0}
    return {name: float(weight / found.sum()) for name, weight in zip(names, found, strict=True)}


def _threshold(ensemble: Array, labels: NDArray[np.bool_], accept_wrong: float) -> float:
    """The lowest score from which no larger share of the wrong steps passes."""
    wrong = np.sort(ensemble[~labels])[::-1]
    allowed = int(np.floor(accept_wrong * len(wrong)))
    if allowed >= len(wrong):
        return 0.0
    # Halfway to the best score among those that must not pass and the next higher one.
    barrier = float(wrong[allowed])
    above = ensemble[ensemble > barrier]
    middle = (barrier + float(above.min())) / 2 if len(above) else 1.0
    rounded = round(middle, 4)
    return min(1.0, rounded if rounded > barrier else middle)


def reliability_plot(found: Fit) -> bytes:
    """Share of right steps against the probability given to them, as PNG."""
    # matplotlib takes seconds to import: only where a plot is drawn.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares, predicted = calibration_curve(
        found.labels, found.probabilities, n_bins=10, strategy="quantile"
    )
    figure = Figure(figsize=(5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    axes.plot(predicted, shares, marker="o")
    axes.set_xlabel("probability that a step is right (cross-validated)")
    axes.set_ylabel("share that is right")
    axes.set_title(f"AUC {found.auc:.3f}, Brier score {found.brier:.3f}")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()

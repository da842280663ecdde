"""Estimates with 95% intervals, by way of SciPy."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, rankdata

Array = NDArray[np.floating]
_NUM_RESAMPLES = 300


def auc(values: Array, is_right: NDArray[np.bool_]) -> float:
    """Probability that a right step has the higher value than a wrong one, ties counting half."""
    num_right = int(is_right.sum())
    num_wrong = len(is_right) - num_right
    if not num_right or not num_wrong:
        return float("nan")
    ranks = rankdata(values)[is_right].sum()
    return float((ranks - num_right * (num_right + 1) / 2) / (num_right * num_wrong))


def interval(
    estimate: Callable[[NDArray[np.integer]], float], clusters: Sequence[int]
) -> tuple[float, float]:
    """95% percentile bootstrap of ``estimate(rows)``, whole clusters drawn.

    Steps of one problem are no independent observations; the problem is what is drawn.
    """
    rng = np.random.default_rng(0)
    order = np.argsort(clusters, kind="stable")
    _, starts = np.unique(np.asarray(clusters)[order], return_index=True)
    members = np.split(order, starts[1:])
    found = []
    for _ in range(_NUM_RESAMPLES):
        drawn = rng.integers(len(members), size=len(members))
        found.append(estimate(np.concatenate([members[index] for index in drawn])))
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)


def wilson(num_right: int, count: int) -> tuple[float, float]:
    """95% Wilson interval of a share."""
    low, high = binomtest(num_right, count).proportion_ci(method="wilson")
    return float(low), float(high)


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """Exact two-sided p-value that two methods are right equally often on the same problems."""
    better = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    worse = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0

"""Estimates with 95% intervals and paired tests, by way of SciPy."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, wilcoxon

Array = NDArray[np.floating[Any]]
_NUM_RESAMPLES = 300


def interval(
    estimate: Callable[[NDArray[np.integer]], float], clusters: Sequence[Hashable]
) -> tuple[float, float]:
    """95% percentile bootstrap of ``estimate(rows)``, whole clusters drawn.

    Steps of one problem are no independent observations; the problem is what is drawn.
    """
    rng = np.random.default_rng(0)
    members: dict[Hashable, list[int]] = {}
    for row, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(row)
    groups = [np.array(rows) for rows in members.values()]
    found = []
    for _ in range(_NUM_RESAMPLES):
        drawn = rng.integers(len(groups), size=len(groups))
        found.append(estimate(np.concatenate([groups[index] for index in drawn])))
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)


def wilson(num_right: int, count: int) -> tuple[float, float]:
    """95% Wilson interval of a share."""
    low, high = binomtest(num_right, count).proportion_ci(method="wilson")
    return float(low), float(high)


def accuracy_interval(outcomes: Sequence[tuple[Hashable, bool]]) -> tuple[float, float]:
    """95% interval of the share that is right, of outcomes by problem.

    Wilson's where every problem was solved once. Over several seeds, whose outcomes depend on one
    another, it is that of as many independent outcomes as would vary so much; and of as many as
    there are problems, where none differs from another: a few that agree prove little.
    """
    by_problem: dict[Hashable, list[bool]] = {}
    for problem, is_right in outcomes:
        by_problem.setdefault(problem, []).append(is_right)
    groups, count = list(by_problem.values()), len(outcomes)
    num_right = sum(map(sum, groups))
    if len(groups) == count:
        return wilson(num_right, count)
    share = num_right / count
    deviations = np.array([sum(group) - share * len(group) for group in groups])
    variance = float((deviations**2).sum()) / count**2 * len(groups) / max(1, len(groups) - 1)
    alike = share * (1 - share) / variance if variance > 0 else len(groups)
    return _wilson(share, min(count, alike))


def _wilson(share: float, size: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval where the size of the sample is no whole number."""
    middle = share + z * z / (2 * size)
    half = z * np.sqrt(share * (1 - share) / size + (z / (2 * size)) ** 2)
    scale = 1 + z * z / size
    return float(max(0.0, (middle - half) / scale)), float(min(1.0, (middle + half) / scale))


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """Exact two-sided p-value that two methods are right equally often on the same problems."""
    better = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    worse = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def paired_p(
    ours: Mapping[Any, Sequence[bool]], theirs: Mapping[Any, Sequence[bool]]
) -> float | None:
    """P-value that two methods are equally often right on the problems that both solved.

    McNemar's exact test where each was solved once, else Wilcoxon's signed ranks of the shares.
    """
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    if all(len(ours[key]) == len(theirs[key]) == 1 for key in both):
        return mcnemar([ours[key][0] for key in both], [theirs[key][0] for key in both])
    shares = [float(np.mean(ours[key]) - np.mean(theirs[key])) for key in both]
    return float(wilcoxon(shares).pvalue) if any(shares) else 1.0

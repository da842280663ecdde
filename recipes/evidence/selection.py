"""How often the selected candidate is right: each selector beside chance and the best possible."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specguard.bench.statistics import Array, interval

Row = dict[str, Any]


def _is_right(row: Row, place: int) -> bool:
    return row["candidates"][row["samples"][place]]["error"] is None


def _signal(row: Row, place: int, name: str) -> float:
    value: float = row["candidates"][row["samples"][place]]["signals"][name]
    return value


def _random(row: Row, k: int) -> float:
    return float(np.mean([_is_right(row, place) for place in range(k)]))


def _best_possible(row: Row, k: int) -> float:
    return float(any(_is_right(row, place) for place in range(k)))


def _by_signal(name: str) -> Callable[[Row, int], float]:
    def chosen(row: Row, k: int) -> float:
        best = max(range(k), key=lambda place: (round(_signal(row, place, name), 6), -place))
        return float(_is_right(row, best))

    return chosen


def _mean_of(shares: Array, rows: NDArray[np.integer]) -> float:
    return float(shares[rows].mean())


def _medoid(embedder: str) -> Callable[[Row, int], float]:
    def chosen(row: Row, k: int) -> float:
        similarities = row["similarities"][embedder][str(k)]

        def key(place: int) -> tuple[float, float, int]:
            logprob = _signal(row, place, "draft log_prob")
            return round(similarities[place], 6), round(logprob, 6), -place

        return float(_is_right(row, max(range(k), key=key)))

    return chosen


def table(
    rows: Iterable[Row], numbers: Iterable[int]
) -> list[tuple[str, int, float, float, float]]:
    """Share of right selections by selector and k, with its 95% interval."""
    rows = list(rows)
    clusters = [row["problem"] for row in rows]
    selectors: dict[str, Callable[[Row, int], float]] = {"a random candidate": _random}
    for embedder in rows[0]["similarities"]:
        selectors[f"medoid, {embedder}"] = _medoid(embedder)
    selectors["highest draft log-prob (min)"] = _by_signal("draft log_prob")
    selectors["highest draft log-prob (mean)"] = _by_signal("draft log_prob_mean")
    selectors["the target: highest log-prob (min)"] = _by_signal("target log_prob")
    selectors["the target: highest log-prob (mean)"] = _by_signal("target log_prob_mean")
    selectors["best possible"] = _best_possible
    found = []
    for name, select in selectors.items():
        for k in numbers:
            shares = np.array([select(row, k) for row in rows])
            low, high = interval(partial(_mean_of, shares), clusters)
            found.append((name, k, float(shares.mean()), low, high))
    return found

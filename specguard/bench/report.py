"""The table of a benchmark: what each method got right, what it cost, whether that differs."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specguard.bench.methods import BASELINE
from specguard.bench.statistics import accuracy_interval, paired_p
from specguard.bench.tables import as_table

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Line:
    """One method. Shares lie in [0, 1], times are in seconds, ``interval`` and ``p`` at 95%.

    ``p`` is of a paired test against the target alone, None where that was not run.
    ``relative_flops`` are those of the target alone times this; ``peak_mebibytes`` is the most that
    the process had held by then, all methods together.
    """

    method: str
    num_problems: int
    accuracy: float
    interval: tuple[float, float]
    p: float | None
    mean_seconds: float
    p95_seconds: float
    relative_seconds: float | None
    tokens_per_second: float
    steps_accepted: float | None
    tokens_accepted: float | None
    target_tokens: float
    target_tokens_read: float
    relative_flops: float | None
    peak_mebibytes: float
    phases: dict[str, float]


def summarise(rows: Rows, num_parameters: tuple[int, int]) -> list[Line]:
    """A line for each method, in order of first appearance.

    Args:
        rows: of a `specguard.bench.runner.Run`.
        num_parameters: of draft and target, to count floating-point operations by: two for each
            parameter and token.
    """
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    baseline = by_method.get(BASELINE)
    return [
        _line(name, found, None if name == BASELINE else baseline, baseline, num_parameters)
        for name, found in by_method.items()
    ]


def _line(
    name: str,
    rows: Rows,
    other: Rows | None,
    baseline: Rows | None,
    num_parameters: tuple[int, int],
) -> Line:
    seconds = np.array([row["seconds"] for row in rows])
    verified_steps = _total(rows, "num_verified_steps")
    guessed = _total(rows, "num_guessed_tokens")
    tokens_accepted = None
    if verified_steps:
        step_tokens = _total(rows, "num_verified_step_tokens")
        tokens_accepted = _total(rows, "num_accepted_tokens") / step_tokens
    elif guessed:
        tokens_accepted = _total(rows, "num_kept_tokens") / guessed
    relative_seconds = relative_flops = None
    if baseline:
        ids = {row["id"] for row in rows} & {row["id"] for row in baseline}
        both = [[row for row in part if row["id"] in ids] for part in (rows, baseline)]
        if ids and _total(both[1], "seconds"):
            relative_seconds = _mean(both[0], "seconds") / _mean(both[1], "seconds")
            flops = [_flops(part, num_parameters) / len(part) for part in both]
            relative_flops = flops[0] / flops[1]
    whole = float(seconds.sum()) or float("inf")  # none where nothing came of any problem
    phases: dict[str, float] = {}
    for row in rows:
        for phase, spent in row["phase_seconds"].items():
            phases[phase] = phases.get(phase, 0.0) + spent / whole
    return Line(
        method=name,
        num_problems=len({row["id"] for row in rows}),
        accuracy=_mean(rows, "is_right"),
        interval=accuracy_interval([(row["id"], bool(row["is_right"])) for row in rows]),
        p=None if other is None else paired_p(_by_problem(rows), _by_problem(other)),
        mean_seconds=float(seconds.mean()),
        p95_seconds=float(np.quantile(seconds, 0.95)),
        relative_seconds=relative_seconds,
        tokens_per_second=_total(rows, "num_tokens") / whole,
        steps_accepted=_total(rows, "num_accepted_steps") / verified_steps
        if verified_steps
        else None,
        tokens_accepted=tokens_accepted,
        target_tokens=_mean(rows, "num_target_tokens"),
        target_tokens_read=_mean(rows, "num_verified_tokens"),
        relative_flops=relative_flops,
        peak_mebibytes=max(row["peak_mebibytes"] for row in rows),
        phases=phases,
    )


def _by_problem(rows: Rows) -> dict[str, list[bool]]:
    found: dict[str, list[bool]] = {}
    for row in rows:
        found.setdefault(row["id"], []).append(bool(row["is_right"]))
    return found


def _total(rows: Rows, field: str) -> float:
    return float(sum(row[field] for row in rows))


def _mean(rows: Rows, field: str) -> float:
    return _total(rows, field) / len(rows)


def _flops(rows: Rows, num_parameters: tuple[int, int]) -> float:
    """Two a parameter and token; a model reads the prompt if it does anything at all."""
    draft, target = num_parameters
    found = 0.0
    for row in rows:
        drafted = row["num_drafted_tokens"] + row["num_guessed_tokens"]
        by_target = row["num_target_tokens"] + row["num_verified_tokens"]
        found += 2 * draft * (drafted + (row["num_prompt_tokens"] if drafted else 0))
        found += 2 * target * (by_target + (row["num_prompt_tokens"] if by_target else 0))
    return found


_COLUMNS = (
    "method",
    "problems",
    "right",
    "95% interval",
    "p vs target",
    "s mean",
    "s p95",
    "time vs target",
    "tokens/s",
    "steps accepted",
    "tokens accepted",
    "target wrote",
    "target read",
    "FLOPs vs target",
    "peak MiB",
)


def cells(line: Line) -> list[str]:
    """What a table shows of a method."""

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    low, high = line.interval
    return [
        line.method,
        str(line.num_problems),
        share(line.accuracy),
        f"{low:.1%} - {high:.1%}",
        "" if line.p is None else f"{line.p:.3f}",
        f"{line.mean_seconds:.3f}",
        f"{line.p95_seconds:.3f}",
        ratio(line.relative_seconds),
        f"{line.tokens_per_second:.1f}",
        share(line.steps_accepted),
        share(line.tokens_accepted),
        f"{line.target_tokens:.1f}",
        f"{line.target_tokens_read:.1f}",
        ratio(line.relative_flops),
        f"{line.peak_mebibytes:.0f}",
    ]


def as_markdown(lines: Sequence[Line]) -> str:
    """A Markdown table."""
    return as_table(_COLUMNS, list(map(cells, lines)))


def as_csv(lines: Sequence[Line]) -> str:
    """The figures unrounded, phases in columns of their own."""
    phases = sorted({phase for line in lines for phase in line.phases})
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    fields = [name for name in Line.__dataclass_fields__ if name not in ("interval", "phases")]
    writer.writerow([*fields, "low", "high", *(f"share_{phase}" for phase in phases)])
    for line in lines:
        values = [getattr(line, name) for name in fields]
        writer.writerow(
            ["" if value is None else value for value in values]
            + [*line.interval, *(line.phases.get(phase, 0.0) for phase in phases)]
        )
    return stream.getvalue()

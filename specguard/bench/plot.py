"""Accuracy against latency, the frontier that methods compete for."""

import io
from collections.abc import Sequence

from specguard.bench.report import Line


def plot(lines: Sequence[Line], kind: str) -> bytes:
    """A picture of ``kind`` png or svg, the 95% intervals as bars."""
    # matplotlib takes seconds to import: only where a plot is drawn.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for line in lines:
        low, high = line.interval
        accuracy = 100 * line.accuracy
        axes.errorbar(
            line.mean_seconds,
            accuracy,
            yerr=[[max(0.0, accuracy - 100 * low)], [max(0.0, 100 * high - accuracy)]],
            fmt="o",
            capsize=3,
        )
        axes.annotate(
            line.method,
            (line.mean_seconds, accuracy),
            textcoords="offset points",
            xytext=(6, 4),
            fontsize=8,
        )
    axes.set_xlabel("seconds a problem")
    axes.set_ylabel("right, %")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, dpi=150)
    return stream.getvalue()

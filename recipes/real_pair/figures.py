"""Shares of right steps and the AUC of each signal, of what is collected so far; only reads.

Knows the files and the tokenizer, no engine. Labels alone give the shares; ``signals.jsonl`` adds
the AUCs and what a threshold lets pass::

    python -m recipes.real_pair.figures --output STEPS --pair PAIR
"""

import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from recipes.evidence.signals import auc
from recipes.real_pair.lines import Record, read_lines
from recipes.real_pair.signals import NUM_LAYERS, SOURCES
from recipes.real_pair.steps import NUM_SAMPLED
from specguard.backends.tokenizer import FolderTokenizer
from specguard.core import Candidate, DraftCost
from specguard.core.embedders import embed_by_ngrams, embed_by_numbers
from specguard.core.loop import LEAST_CONFIDENCE
from specguard.core.selector import mean_similarities
from specguard.core.speculation import HIGHEST_CONFIDENCE, MOST_CONFIDENT_GUESSES
from specguard.files import write_atomically

NUMERIC = re.compile(r"[\d=+\-*/×÷]")  # noqa: RUF001
NAME = re.compile(r"\s?[A-Z][a-z]+")
Array = NDArray[np.float64]
ROLES = "target", "draft"
BOUNDS = -2, -3, -4, -4.5, -6, -9, -12, -15, -20
NUM_ROUNDS = 8


class Point(NamedTuple):
    """A bound, the shares of right, of wrong and of all steps that pass wrongly, and the time."""

    name: str
    right: float
    wrong: float
    wrong_of_all: float
    time: float


def share(rows: Sequence[Record]) -> str:
    """How many are right."""
    right = sum(row["right"] for row in rows)
    return f"{right}/{len(rows)} = {right / max(1, len(rows)):.3f}"


def computes(row: Record) -> bool:
    """Whether a step holds a calculation."""
    return "=" in row["text"] and any(map(str.isdigit, row["text"]))


def share_of_samples(labels: Sequence[Record]) -> float:
    """Share of right steps among all sampled ones, weighed by multiplicity.

    The greedy label stands for the samples equal to it, the labelled sample for all others: it was
    drawn at random among them.
    """
    kinds = {(row["problem"], row["step"], row["kind"]): row for row in labels}
    shares = []
    for (problem, step, kind), greedy in kinds.items():
        if kind == "greedy":
            other = kinds.get((problem, step, "sample"), greedy)
            num_greedy = greedy["multiplicity"]
            num_right = num_greedy * greedy["right"] + (NUM_SAMPLED - num_greedy) * other["right"]
            shares.append(num_right / NUM_SAMPLED)
    return float(np.mean(shares)) if shares else float("nan")


def reductions(row: Record, pieces: Sequence[str]) -> dict[str, float]:
    """One number a signal; higher is meant to speak for the step.

    ``pieces`` are the texts of the step's tokens. Typical acceptance is that of Medusa (Cai et al.
    2024): a token passes from min(epsilon, sqrt(epsilon) exp(-H)) on, epsilon 0.09.
    """
    target, draft = (np.array(row[role]["lp"]) for role in ("target", "draft"))
    entropy = np.array(row["target"]["h"])
    is_number = np.array([bool(NUMERIC.search(piece)) for piece in pieces])
    is_name = np.array([bool(NAME.match(piece)) for piece in pieces])
    is_first = np.array(row["target"]["first"])
    typical = np.minimum(np.log(0.09), np.log(0.3) - entropy)
    values = {
        "target: min": target.min(),
        "target: mean": target.mean(),
        "target: sum": target.sum(),
        "target: 10% quantile": np.quantile(target, 0.1),
        "target: share of tokens above -1": (target > -1).mean(),
        "target: number of tokens below -2": -(target < -2).sum(),
        "target: min over numbers and operators": target[is_number].min(initial=0),
        "target: min over numbers, operators, names": target[is_number | is_name].min(initial=0),
        "target: sum over numbers and operators": target[is_number].sum(),
        "target: least margin to the first choice": min(row["target"]["margin"]),
        "target: sum of margins": sum(row["target"]["margin"]),
        "target: worst rank": -max(row["target"]["rank"]),
        "target: number of other choices": -(~is_first).sum(),
        "target: share of first choices": is_first.mean(),
        "target: typical acceptance, min": (target - typical).min(),
        "target: log-prob + entropy, min": (target + entropy).min(),
        "target: entropy, mean": -entropy.mean(),
        "target: entropy, max": -entropy.max(),
        "draft: min": draft.min(),
        "draft: sum": draft.sum(),
        "draft: mean": draft.mean(),
        "draft: min over numbers and operators": draft[is_number].min(initial=0),
        "draft: entropy, sum": -sum(row["draft"]["h"]),
        "log ratio": (target - draft).sum(),
        "log ratio, min": (target - draft).min(),
        "log ratio, mean": (target - draft).mean(),
        "length": -len(target),
    }
    for role in ("target", "draft"):
        for sources in SOURCES if SOURCES[0] in row[role] else ():
            own = row[role][sources]
            for place, num_layers in enumerate(NUM_LAYERS):
                for name in "min", "mean":
                    of_layers = f"grounding {name}, {sources}, L = {num_layers}"
                    values[f"{role}: {of_layers}"] = own[name][place]
            for layer, (source, sink) in enumerate(zip(own["source"], own["sink"], strict=True)):
                values[f"{role}: source mass, {sources}, layer {layer}"] = source
                if sources == "problem":
                    values[f"{role}: sink mass, layer {layer}"] = -sink
    return {name: float(value) for name, value in values.items()}


def passing_right(values: Array, is_right: NDArray[np.bool_], wrong_share: float) -> float:
    """Share of right steps that pass where at most a share of the wrong ones does."""
    wrong = np.sort(values[~is_right])[::-1]
    barrier = wrong[int(wrong_share * len(wrong))] if len(wrong) else -np.inf
    return float((values[is_right] > barrier).mean())


def parts_of(rows: Sequence[Record]) -> dict[str, NDArray[np.bool_]]:
    """Kinds of steps, as masks."""
    has_sum = np.array([computes(row) for row in rows], bool)
    return {
        "all": np.full(len(rows), True),
        "with a calculation": has_sum,
        "without": ~has_sum,
        "not the target's own": np.array([not row["same_as_own"] for row in rows], bool),
        "greedy": np.array([row["kind"] == "greedy" for row in rows], bool),
    }


def table(rows: Sequence[Record], values: Sequence[dict[str, float]]) -> list[str]:
    """Lines of a table: of each signal the AUC by kind of step, and what passes of greedy steps."""
    is_right = np.array([row["right"] for row in rows], bool)
    parts = parts_of(rows)
    names = [*parts, "right greedy ones that pass with 10% of wrong ones", "with 25%"]
    lines = ["| signal | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    greedy = parts["greedy"]
    for name in values[0]:
        column = np.array([own[name] for own in values])
        cells = [f"{auc(column[part], is_right[part]):.3f}" for part in parts.values()]
        for share_passing in 0.1, 0.25:
            passing = passing_right(column[greedy], is_right[greedy], share_passing)
            cells.append(f"{passing:.2f}")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


@dataclass(frozen=True, slots=True)
class Drafted:
    """A greedy step of the draft: what both models say of its n tokens."""

    target: Array
    is_first: NDArray[np.bool_]
    draft: Array  # the draft's own log-probabilities
    is_right: bool

    @classmethod
    def of(cls, row: Record) -> "Drafted":
        """A labelled step."""
        target, draft = (np.array(row[role]["lp"], dtype=np.float64) for role in ROLES)
        return cls(target, np.array(row["target"]["first"], bool), draft, row["right"])

    def part(self, start: int, most: int, least: float) -> int:
        """Where a part from ``start`` on ends: with the draft's confidence or after ``most``."""
        totals = np.cumsum(self.draft[start : start + most])
        below = np.flatnonzero(totals < np.log(least)) if least else np.zeros(0, int)
        return int(start + (below[0] + 1 if len(below) else len(totals)))

    def first_other(self, start: int) -> int:
        """The first token from ``start`` on that the target would not have written, or n."""
        others = np.flatnonzero(~self.is_first[start:])
        return int(start + others[0]) if len(others) else len(self.target)


def by_guesses(step: Drafted, start: int, cost: DraftCost, pace: float) -> float:
    """What the target's rest of a step costs, the draft guessing, if both wrote on alike."""
    least = min(HIGHEST_CONFIDENCE, (cost.candidate + cost.reading) / pace)
    spent, n = 0.0, len(step.target)
    while start < n:
        end = step.part(start, MOST_CONFIDENT_GUESSES, least)
        spent += cost.of_step(1, end - start, end - start)
        start = min(n, step.first_other(start) + 1 if step.first_other(start) < end else end + 1)
    return spent


def read_along(step: Drafted, bound: float, cost: DraftCost, pace: float) -> tuple[float, bool]:
    """What a step costs that passes from a sum on, and whether it does, as the loop goes."""
    spent, start, n = 0.0, 0, len(step.target)
    while start < n:
        end = step.part(start, n, LEAST_CONFIDENCE)
        spent += cost.of_step(1, end - start, end - start)
        start = end
        if step.target[:end].sum() < bound:
            # The target's own choice in the place of the first other token is known.
            return spent + by_guesses(step, step.first_other(0) + 1, cost, pace), False
    return spent, True


def frontier(rows: Sequence[Record], cost: DraftCost) -> list[Point]:
    """What bounds on the sum let pass of greedy steps, and the time as a share of the target's.

    The first point is token-level speculation, where nothing passes; its time is the pace that the
    others rewrite at.
    """
    steps = [Drafted.of(row) for row in rows if row["kind"] == "greedy"]
    num_tokens = sum(len(step.target) for step in steps)
    pace = 1.0
    for _ in range(NUM_ROUNDS):  # a guess ends by the pace, and the pace is what guesses come to
        pace = sum(by_guesses(step, 0, cost, pace) for step in steps) / num_tokens
    is_right = np.array([step.is_right for step in steps])
    points = [Point("sd", 0.0, 0.0, 0.0, pace)]
    for bound in BOUNDS:
        found = [read_along(step, bound, cost, pace) for step in steps]
        passes = np.array([passed for _, passed in found])
        right, wrong = passes[is_right].mean(), passes[~is_right].mean()
        time = sum(spent for spent, _ in found) / num_tokens
        wrong_of_all = float((passes & ~is_right).mean())
        points.append(Point(f"{bound:g}", float(right), float(wrong), wrong_of_all, time))
    return points


def drawn(points: Sequence[Point]) -> bytes:
    """Wrong steps that pass, of all, against the time, as PNG."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([p.time for p in points[1:]], [100 * p.wrong_of_all for p in points[1:]], marker="o")
    axes.plot(points[0].time, 0, marker="s", color="grey")
    for point in points:
        place = point.time, 100 * point.wrong_of_all
        axes.annotate(point.name, place, textcoords="offset points", xytext=(5, 5))
    axes.set_xlabel("time, the target alone = 1 (worked out)")
    axes.set_ylabel("wrong steps that pass, % of all")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def consistency(labels: Sequence[Record], positions: Sequence[Record]) -> dict[str, Array]:
    """How much each labelled step is like the draft's other samples of its place, in three ways.

    The share of the samples with its very tokens, and its mean similarity to those that are not the
    step itself, by n-grams and by numbers (`specguard.core.embedders`).
    """
    samples = {(row["problem"], row["step"]): row["samples"] for row in positions}
    found: dict[str, list[float]] = {"equal": [], "n-grams": [], "numbers": []}
    for label in labels:
        others = list(samples[label["problem"], label["step"]])
        found["equal"].append(label["multiplicity"] / len(others))
        if label["candidate"] is not None:
            del others[label["candidate"]]
        texts = [label["text"], *(other["text"] for other in others)]
        steps = [Candidate((0,), text, np.zeros(1), "delimiter") for text in texts]
        for name, embed in ("n-grams", embed_by_ngrams), ("numbers", embed_by_numbers):
            found[name].append(mean_similarities(embed(steps))[0])
    return {name: np.array(values) for name, values in found.items()}


def shares(labels: Sequence[Record]) -> list[str]:
    """Lines about the labels: shares of right steps by kind, by content and by place."""
    lines = [
        f"labels {len(labels)}, methods {dict(Counter(row['method'] for row in labels))}",
        f"all samples, weighed by multiplicity: {share_of_samples(labels):.3f}",
        f"not the target's own: {share([row for row in labels if row['method'] != 'own'])}",
        f"outcomes {dict(Counter(tuple(row['outcomes']) for row in labels))}",
    ]
    for kind in ("greedy", "sample"):
        rows = [row for row in labels if row["kind"] == kind]
        lines.append(f"{kind}: {share(rows)}")
        lines.append(f"  with a calculation: {share([row for row in rows if computes(row)])}")
        lines.append(f"  without: {share([row for row in rows if not computes(row)])}")
        for step in sorted({row["step"] for row in rows}):
            lines.append(f"  step {step}: {share([row for row in rows if row['step'] == step])}")
    return lines


@click.command()
@click.option(
    "--output",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder with the collected steps.",
)
@click.option(
    "--pair", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True
)
@click.option(
    "--draft-cost",
    default=(0.16, 1.0, 0.044),
    show_default=True,
    type=(float, float, float),
    help="In decode steps of the target: a token of the draft, a verifying pass, each token in it.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="File for the frontier, PNG.")
def main(
    output: Path, pair: Path, draft_cost: tuple[float, float, float], plot: Path | None
) -> None:
    """Print the figures of the steps in the folder OUTPUT."""
    click.echo(f"solutions right: {share(read_lines(output / 'solutions.jsonl'))}")
    labels = read_lines(output / "labels.jsonl")
    click.echo("\n".join(shares(labels)))
    parts, is_right = parts_of(labels), np.array([row["right"] for row in labels], bool)
    alike = consistency(labels, read_lines(output / "candidates.jsonl"))
    click.echo(f"\nAUC of consistency with 8 samples, on {len(labels)} labels:\n")
    click.echo("| consistency | " + " | ".join(parts) + " |\n" + "|---" * (1 + len(parts)) + "|")
    for name, column in alike.items():
        cells = [f"{auc(column[part], is_right[part]):.3f}" for part in parts.values()]
        click.echo(f"| {' | '.join([name, *cells])} |")
    repeats = read_lines(output / "labels_repeat.jsonl")
    noise = Counter((row["right"], sum(row["outcomes"])) for row in repeats)
    click.echo(f"repeats {len(repeats)}: (label, right ones of three) {dict(noise)}")
    rows = read_lines(output / "signals.jsonl")
    if not rows:
        return
    tokenizer = FolderTokenizer(pair / "coder-1.5b")
    values = [reductions(row, [tokenizer.decode([t]) for t in row["token_ids"]]) for row in rows]
    has_attention = [SOURCES[0] in row["target"] for row in rows]
    without = [
        {k: v for k, v in own.items() if "grounding" not in k and "mass" not in k} for own in values
    ]
    click.echo(f"\nAUC on {len(rows)} labels:\n\n" + "\n".join(table(rows, without)))
    some = [row for row, has in zip(rows, has_attention, strict=True) if has]
    own = [row for row, has in zip(values, has_attention, strict=True) if has]
    if some:
        click.echo(f"\nof attention, on {len(some)} labels:\n\n" + "\n".join(table(some, own)))
    token, verification, reading = draft_cost
    points = frontier(rows, DraftCost(token, verification=verification, reading=reading))
    names = "sum from", "right ones that pass", "wrong ones", "wrong ones, of all", "time"
    click.echo(f"\ncost {draft_cost}:\n\n| {' | '.join(names)} |\n" + "|---" * len(names) + "|")
    for point in points:
        passing = [f"{value:.1%}" for value in point[1:4]]
        click.echo(f"| {' | '.join([point.name, *passing, f'{point.time:.2f}'])} |")
    if plot is not None:
        write_atomically(plot, drawn(points))


if __name__ == "__main__":
    main()

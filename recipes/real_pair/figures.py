"""Shares of right steps and the AUC of each signal, of what is collected so far; only reads.

Knows the files, no engine. Labels alone give the shares; ``signals.jsonl`` adds the AUCs, and
``--pair`` those over tokens with digits and operators, which need the tokenizer::

    python -m recipes.real_pair.figures --output STEPS [--pair PAIR]
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from recipes.evidence.signals import auc
from recipes.real_pair.lines import Record, read_lines
from recipes.real_pair.steps import NUM_SAMPLED
from specguard.backends.tokenizer import FolderTokenizer

NUMERIC = re.compile(r"[\d=+\-*/×÷]")  # noqa: RUF001
Array = NDArray[np.float64]


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


def num_leading(is_first: Sequence[bool]) -> int:
    """How many tokens from the beginning on are first choices."""
    others = np.flatnonzero(~np.array(is_first, bool))
    return int(others[0]) if len(others) else len(is_first)


def reductions(row: Record) -> dict[str, float]:
    """One number a signal; higher is meant to speak for the step."""
    target, entropies = np.array(row["t_lp"]), np.array(row["t_h"])
    draft, draft_entropies = np.array(row["d_lp"]), np.array(row["d_h"])
    values = {
        "target min": target.min(),
        "target mean": target.mean(),
        "target 10% quantile": np.quantile(target, 0.1),
        "target 25% quantile": np.quantile(target, 0.25),
        "target sum": target.sum(),
        "target share above -1": (target > -1).mean(),
        "target share above -2": (target > -2).mean(),
        "target share of first choices": np.mean(row["t_first"]),
        "target share of leading choices": num_leading(row["t_first"]) / len(target),
        "target typicality min": (target + entropies).min(),
        "target typicality mean": (target + entropies).mean(),
        "target entropy mean": -entropies.mean(),
        "target entropy max": -entropies.max(),
        "draft min": draft.min(),
        "draft mean": draft.mean(),
        "draft entropy mean": -draft_entropies.mean(),
        "target - draft mean": (target - draft).mean(),
        "target - draft min": (target - draft).min(),
        "length": -len(target),
    }
    return {name: float(value) for name, value in values.items()}


def numeric_min(logprobs: Sequence[float], pieces: Sequence[str]) -> float:
    """The least log-probability of a token with a digit or an operator; 0 where there is none."""
    pairs = zip(logprobs, pieces, strict=True)
    return min((value for value, piece in pairs if NUMERIC.search(piece)), default=0.0)


def table(rows: Sequence[Record], decode: Callable[[Sequence[int]], str] | None) -> list[str]:
    """Lines of a table: the AUC of each signal on all steps and on parts of them."""
    values = [reductions(row) for row in rows]
    if decode is not None:
        for row, own in zip(rows, values, strict=True):
            pieces = [decode([token]) for token in row["token_ids"]]
            own["target min over numbers"] = numeric_min(row["t_lp"], pieces)
            own["draft min over numbers"] = numeric_min(row["d_lp"], pieces)
    is_right = np.array([row["right"] for row in rows], bool)
    has_sum = np.array([computes(row) for row in rows], bool)
    parts = {
        "all": np.full(len(rows), True),
        "with a calculation": has_sum,
        "without": ~has_sum,
        "not the target's own": np.array([not row["same_as_own"] for row in rows], bool),
        "sampled": np.array([row["kind"] == "sample" for row in rows], bool),
    }
    lines = ["| signal | " + " | ".join(parts) + " |", "|---" * (1 + len(parts)) + "|"]
    for name in values[0]:
        column = np.array([own[name] for own in values])
        areas = [f"{auc(column[part], is_right[part]):.3f}" for part in parts.values()]
        lines.append("| " + " | ".join([name, *areas]) + " |")
    return lines


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
@click.option("--pair", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(output: Path, pair: Path | None) -> None:
    """Print the figures of the steps in the folder OUTPUT."""
    click.echo(f"solutions right: {share(read_lines(output / 'solutions.jsonl'))}")
    click.echo("\n".join(shares(read_lines(output / "labels.jsonl"))))
    repeats = read_lines(output / "labels_repeat.jsonl")
    noise = Counter((row["right"], sum(row["outcomes"])) for row in repeats)
    click.echo(f"repeats {len(repeats)}: (label, right ones of three) {dict(noise)}")
    rows = read_lines(output / "signals.jsonl")
    if rows:
        decode = None
        if pair is not None:
            decode = FolderTokenizer(pair / "coder-1.5b").decode
        click.echo(f"\nAUC on {len(rows)} labels:\n\n" + "\n".join(table(rows, decode)))


if __name__ == "__main__":
    main()

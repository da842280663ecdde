"""Whole solutions by a grid of verifiers: right answers beside what they cost, for each.

On training problems, to choose; on test problems, to state what was chosen. Costs are counts of
tokens and passes, turned into the target's decode steps by figures of a quiet machine, so that this
may run beside other work and in large batches. Goes on where it was stopped::

    python -m recipes.real_pair.frontier --pair PAIR --data train.jsonl --output OUT
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from specguard import load
from specguard.bench.datasets import load_dataset
from specguard.bench.methods import Method
from specguard.bench.runner import Run
from specguard.bench.statistics import mcnemar
from specguard.core import GREEDY, VerifierConfig
from specguard.files import write_atomically

SUM, NUMBERS = "log_prob_sum", "log_prob_numbers"


@dataclass(frozen=True, slots=True)
class Verifier:
    """Passes from a sum of log-probabilities on, which may weigh the least one of a number, too.

    ``least`` is of the sum, plus ``by_numbers`` times the least log-probability of a number.
    """

    least: float
    by_numbers: float = 0.0

    @property
    def name(self) -> str:
        """Short."""
        numbers = f"+{self.by_numbers:g}num" if self.by_numbers else ""
        return f"sum{numbers}>={self.least:g}"

    @property
    def config(self) -> VerifierConfig:
        """The same in the words of a pair: bounds so wide that nothing is clamped that counts."""
        low = 4 * self.least
        weights, bounds = {SUM: 1.0}, {SUM: (low, 0.0)}
        if self.by_numbers:
            weights = {SUM: 0.5, NUMBERS: 0.5}
            bounds[NUMBERS] = (low / self.by_numbers, 0.0)
        # The mean of both scores is 1 - (sum + by_numbers * least) / (2 low).
        threshold = 1 - self.least / low / (2 if self.by_numbers else 1)
        return VerifierConfig(
            weights=weights,
            bounds=bounds,
            threshold=threshold,
        )


def grid(names: str) -> Iterator[Method]:
    """Methods by names: target, draft, or LEAST[/BY_NUMBERS]."""
    for name in names.split(","):
        if name in ("target", "draft"):
            changes: dict[str, Any] = {"method": name, "sampling": GREEDY, "draft_cost": None}
            yield Method(name, changes)
            continue
        parts = [float(part) for part in name.split("/")]
        verifier = Verifier(*parts)
        yield Method(verifier.name, {"verifier": verifier.config, "draft_cost": None})


def cost(row: dict[str, Any], figures: tuple[float, float, float]) -> float:
    """A row's cost in decode steps of the target.

    ``figures`` are a token of the draft, a pass that verifies, and what each token adds to it.
    """
    token, verification, reading = figures
    return float(
        row["num_target_tokens"]
        + token * row["num_drafted_tokens"]
        + verification * row["num_verified_steps"]
        + reading * row["num_verified_tokens"]
    )


def table(rows: list[dict[str, Any]], figures: tuple[float, float, float]) -> str:
    """Markdown: a line a method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    by_method = {name: {r["id"]: r for r in rows if r["method"] == name} for name in methods}
    common = set.intersection(*(set(of) for of in by_method.values()))
    base = by_method.get("target", {})
    lines = [f"{len(common)} problems", "", "| method | right | p | time, target = 1 | accepted |"]
    lines.append("|---|---|---|---|---|")
    for name, of in by_method.items():
        right = [of[key]["is_right"] for key in sorted(common)]
        words = [name, f"{np.mean(right):.1%}", "", "", ""]
        if base and name != "target":
            theirs = [base[key]["is_right"] for key in sorted(common)]
            words[2] = f"{mcnemar(right, theirs):.2f}"
        if base:
            own = sum(cost(of[key], figures) for key in common)
            whole = sum(base[key]["num_target_tokens"] for key in common)
            if name == "draft":
                own = sum(figures[0] * of[key]["num_tokens"] for key in common)
            words[3] = f"{own / whole:.2f}"
        num_verified = sum(of[key]["num_verified_steps"] for key in common)
        if num_verified:
            passed = sum(of[key]["num_accepted_steps"] for key in common)
            words[4] = f"{passed / num_verified:.0%}"
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--pair", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--limit", default=100, show_default=True)
@click.option("--backend", default="vllm", show_default=True)
@click.option("--batch-size", default=48, show_default=True)
@click.option("--methods", default="target,draft,-9/0,-9/3", show_default=True)
@click.option(
    "--figures",
    default=(0.41, 1.0, 0.045),
    show_default=True,
    type=(float, float, float),
    help="In decode steps of the target: a token of the draft, a verifying pass, each token in it.",
)
def main(
    pair: Path,
    data: Path,
    output: Path,
    limit: int,
    backend: str,
    batch_size: int,
    methods: str,
    figures: tuple[float, float, float],
) -> None:
    """Solve problems of GSM8K by a grid of verifiers."""
    items = load_dataset("gsm8k", data, limit=limit)
    solver = load(
        draft=str(pair / "coder-0.5b"),
        target=str(pair / "coder-1.5b"),
        backend=backend,
        draft_cost=None,
    )
    run = Run(solver, items, list(grid(methods)), (0,), output, backend, batch_size)
    try:
        for number, row in enumerate(run.rows_to_come(), 1):
            if number % batch_size == 0:
                click.echo(f"{number} of {number + run.num_missing}: {row['method']}", err=True)
        text = table(run.rows, figures)
    finally:
        run.close()
    write_atomically(output / "frontier.md", text.encode())
    click.echo(text, nl=False)


if __name__ == "__main__":
    main()

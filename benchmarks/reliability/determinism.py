"""The same problems in other circumstances.

``python -m benchmarks.reliability.determinism --help``

Texts, decisions, candidates and finish reasons of the built-in pair must be those of the first run:
once more, in another order, in batches, with other numbers of threads, in a process with another
hash seed, with the caches of another run, and on the other backend.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.served import DRAFT_COST, texts

SETTINGS: dict[str, tuple[str, ...]] = {
    "the default": (),
    "four sampled candidates, the medoid": ("--k", "4", "--selector", "ngram"),
    "the target chooses among four": ("--k", "4", "--selector", "target"),
    "sampled rewrites": ("--k", "2", "--rewrite-temperature", "0.7", "--threshold", "0.95"),
    "the paper's preset": ("--preset", "paper", "--k", "4"),
    "sd, greedy": ("--method", "sd"),
    "sd, sampled": ("--method", "sd", "--temperature", "0.7", "--top-p", "0.9"),
    "target, sampled": ("--method", "target", "--temperature", "0.7", "--top-p", "0.9"),
}


@dataclass(frozen=True, slots=True)
class Circumstance:
    """What is different from the first run."""

    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    is_reversed: bool = False


CIRCUMSTANCES = {
    "again": Circumstance(),
    "in another order": Circumstance(is_reversed=True),
    "16 at a time": Circumstance(("--batch-size", "16")),
    "another hash seed and locale": Circumstance(
        environment={"PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Tokyo"}
    ),
    "two threads": Circumstance(environment={"OMP_NUM_THREADS": "2"}),
    "MLX": Circumstance(("--backend", "mlx")),
    "MLX drafts": Circumstance(("--draft-backend", "mlx")),
}


def solutions(
    problems: Sequence[str], options: tuple[str, ...], circumstance: Circumstance, folder: Path
) -> dict[str, dict[str, Any]]:
    """By problem, what a command makes of them."""
    order = list(reversed(problems)) if circumstance.is_reversed else list(problems)
    file = folder / "problems.txt"
    file.write_text("\n".join(order))
    given = [*options, *circumstance.options]
    for name, usual in ("--batch-size", "1"), ("--backend", "cpu"):
        given += [] if name in given else [name, usual]
    if options[:2] != ("--method", "target"):  # which drafts nothing
        given += ["--draft-cost", DRAFT_COST]
    command = [sys.executable, "-m", "specguard", "solve", "--problems", str(file), "--detail"]
    done = subprocess.run(
        [*command, *given],
        env={**os.environ, "OMP_NUM_THREADS": "1", **circumstance.environment},
        capture_output=True,
        check=False,
        text=True,
    )
    if done.returncode not in (0, 3):
        raise click.ClickException(done.stderr)
    rows = map(json.loads, done.stdout.splitlines())
    return {row["problem"]: row for row in rows}


def decided(row: Mapping[str, Any]) -> Any:
    """What must be the same, to the token."""
    steps = [
        (
            *(step[name] for name in ("text", "author", "decision", "selected", "draft_text")),
            [candidate["token_ids"] for candidate in step.get("candidates") or ()],
        )
        for step in row["steps"]
    ]
    return row["text"], row["answer"], row["finish_reason"], steps


def distance(row: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest difference of a signal of the same step."""
    pairs = (
        (one["signals"][name], two["signals"][name])
        for one, two in zip(row["steps"], other["steps"], strict=False)
        for name in (one["signals"] or {}).keys() & (two["signals"] or {}).keys()
    )
    return max((abs(one - two) for one, two in pairs), default=0.0)


@click.command(context_settings={"show_default": True})
@click.option("--problems", "number", type=click.IntRange(min=1), default=40)
@click.option(
    "--circumstance",
    "names",
    multiple=True,
    type=click.Choice(list(CIRCUMSTANCES)),
    default=tuple(CIRCUMSTANCES),
)
@click.option("--setting", "wanted", multiple=True, type=click.Choice(list(SETTINGS)))
def main(number: int, names: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    """Compare; exit 1 where a text or a decision is another."""
    problems = list(dict.fromkeys(texts(number)))
    differing = 0
    click.echo(
        "| settings | circumstance | problems | differing | largest difference of a signal |"
    )
    click.echo("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as kept:
        for told in wanted or SETTINGS:
            options = SETTINGS[told]
            first = solutions(problems, options, Circumstance(), Path(kept))
            for name in names:
                there = solutions(problems, options, CIRCUMSTANCES[name], Path(kept))
                others = [text for text in first if decided(first[text]) != decided(there[text])]
                differing += len(others)
                far = np.max([distance(first[text], there[text]) for text in first])
                click.echo(f"| {told} | {name} | {len(first)} | {len(others)} | {far:.0e} |")
    if differing:
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()

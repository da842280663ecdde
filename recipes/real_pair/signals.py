"""Scores labelled steps with both models of the pair, through this project's torch engines.

Appends to ``signals.jsonl`` one line a label: the label and, a token, log-probability, entropy and
whether the token is the model's first choice. Goes on where it was stopped. Knows only the files::

    python -m recipes.real_pair.signals --pair PAIR --output STEPS
"""

import asyncio
import time
from collections.abc import Hashable
from itertools import groupby
from pathlib import Path

import click

from recipes.real_pair.lines import Lines, Record, read_lines
from specguard.core import Engine, Observation, ScoreJob
from specguard.core.engine import FloatArray

LABEL_FIELDS = (
    "problem",
    "step",
    "kind",
    "right",
    "outcomes",
    "method",
    "same_as_own",
    "first_pick",
    "multiplicity",
    "text",
    "finish",
    "token_ids",
)


def rounded(values: FloatArray) -> list[float]:
    """Four digits are more than bfloat16 has."""
    return [round(float(value), 4) for value in values]


def signals_of(label: Record, num_prefix: int, target: Observation, draft: Observation) -> Record:
    """The line of one label; ``t_`` are the target's values, ``d_`` the draft's."""
    row: Record = {name: label[name] for name in LABEL_FIELDS}
    row["num_prefix"] = num_prefix
    for letter, seen in (("t", target), ("d", draft)):
        assert seen.token_entropies is not None
        row[f"{letter}_lp"] = rounded(seen.token_logprobs)
        row[f"{letter}_h"] = rounded(seen.token_entropies)
        row[f"{letter}_first"] = [bool(value) for value in seen.is_first_choice]
    return row


def identity(row: Record) -> Hashable:
    """What tells one labelled step from all others."""
    return row["problem"], row["step"], tuple(row["token_ids"])


def to_do(labels: list[Record], done: list[Record]) -> list[Record]:
    """The labels without signals, by problem and step."""
    known = {identity(row) for row in done}
    rest = [label for label in labels if identity(label) not in known]
    return sorted(rest, key=lambda label: (label["problem"], label["step"]))


async def score(
    target: Engine, draft: Engine, prefix: tuple[int, ...], labels: list[Record]
) -> list[Record]:
    """The lines of one position's labels."""
    job = ScoreJob(
        key=labels[0]["problem"],
        prefix=prefix,
        continuations=tuple(tuple(label["token_ids"]) for label in labels),
    )
    seen = zip(labels, await target.score(job), await draft.score(job), strict=True)
    return [
        signals_of(label, len(prefix), by_target, by_draft) for label, by_target, by_draft in seen
    ]


@click.command()
@click.option(
    "--pair", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True
)
@click.option(
    "--output",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder with the collected steps.",
)
def main(pair: Path, output: Path) -> None:
    """Write the signals on the labels in the folder OUTPUT."""
    # Here, so that the rest can be imported where there is no torch.
    from specguard.backends.pytorch.loading import load_model

    prefixes = {
        (row["problem"], row["step"]): tuple(row["prefix_token_ids"])
        for row in read_lines(output / "candidates.jsonl")
    }
    signals = Lines(output / "signals.jsonl")
    rest = to_do(read_lines(output / "labels.jsonl"), signals.records)
    click.echo(f"{len(rest)} labels")
    target = load_model(str(pair / "coder-1.5b"), dtype="bfloat16")
    draft = load_model(str(pair / "coder-0.5b"), dtype="bfloat16")
    began, num_done = time.monotonic(), 0
    for problem, of_problem in groupby(rest, key=lambda label: label["problem"]):
        for step, of_step in groupby(of_problem, key=lambda label: label["step"]):
            rows = asyncio.run(score(target, draft, prefixes[problem, step], list(of_step)))
            for row in rows:
                signals.append(row)
            num_done += len(rows)
        target.release(problem)
        draft.release(problem)
        click.echo(f"{num_done} labels in {time.monotonic() - began:.0f} s")
    signals.close()


if __name__ == "__main__":
    main()

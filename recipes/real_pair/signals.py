"""Scores labelled steps with both models of the pair, through this project's torch engines.

Appends to ``signals.jsonl`` one line a label: the label and, a token, log-probability, entropy,
rank and margin to the model's first choice; and, of every third problem, grounding in both source
modes over numbers of layers. Goes on where it was stopped. Knows only the files::

    python -m recipes.real_pair.signals --pair PAIR --output STEPS
"""

import asyncio
import time
from collections.abc import Hashable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import numpy as np

from recipes.real_pair.lines import Lines, Record, read_lines
from recipes.real_pair.steps import LABEL_FIELDS, SYSTEM
from specguard.core import Capture, Engine, Observation, Prompt, Sampling, ScoreJob
from specguard.core.config import Sources
from specguard.core.grounding import grounding, source_mask

SOURCES: tuple[Sources, ...] = ("problem", "context")
NUM_LAYERS = (1, 2, 3, 6, 12, 24)
RESIDUAL = 0.5
ATTENTION_EVERY = 3  # attention of all layers is slow to read: of every third problem only
RAW = Sampling(temperature=1.0, top_p=1.0)


def rounded(values: Iterable[float]) -> list[float]:
    """Four digits are more than bfloat16 has."""
    return [round(float(value), 4) for value in values]


def token_values(token_ids: Sequence[int], seen: Observation) -> dict[str, list[Any]]:
    """What a model says of each token of a step.

    ``rank`` counts the tokens that it finds more probable, ``margin`` is the log-probability less
    that of its first choice.
    """
    assert seen.token_entropies is not None
    assert seen.distributions is not None
    rows = seen.distributions[:-1]
    own = rows[np.arange(len(token_ids)), list(token_ids)]
    return {
        "lp": rounded(seen.token_logprobs),
        "h": rounded(seen.token_entropies),
        "first": seen.is_first_choice.tolist(),
        "rank": (rows > own[:, None]).sum(axis=1).tolist(),
        "margin": rounded(np.log(own) - np.log(rows.max(axis=1))),
    }


def grounding_values(seen: Observation, is_first_row_source: bool) -> dict[str, list[float]]:
    """Least and mean grounding by numbers of layers, and the mean masses a layer.

    ``min`` and ``mean`` are of rollouts over the last L layers, L of `NUM_LAYERS`; ``source`` and
    ``sink`` of each layer alone, from the lowest on.
    """
    assert seen.blocks is not None
    values: dict[str, list[float]] = {"min": [], "mean": []}
    for num_layers in NUM_LAYERS:
        of_tokens = grounding(seen.blocks[-num_layers:], is_first_row_source, RESIDUAL)
        values["min"].append(of_tokens.min())
        values["mean"].append(of_tokens.mean())
    values["source"] = [block.source_mass.mean() for block in seen.blocks]
    values["sink"] = [block.sink_mass.mean() for block in seen.blocks]
    return {name: rounded(row) for name, row in values.items()}


def identity(row: Record) -> Hashable:
    """What tells one labelled step from all others."""
    return row["problem"], row["step"], tuple(row["token_ids"])


def to_do(labels: list[Record], done: list[Record]) -> list[Record]:
    """The labels without signals, by problem and step."""
    known = {identity(row) for row in done}
    rest = [label for label in labels if identity(label) not in known]
    return sorted(rest, key=lambda label: (label["problem"], label["step"]))


async def score(
    engine: Engine, prompt: Prompt, prefix: tuple[int, ...], labels: list[Record]
) -> list[Record]:
    """What one model says of one position's labelled steps."""
    key, continuations = labels[0]["problem"], tuple(tuple(row["token_ids"]) for row in labels)
    rows: list[Record] = [{} for _ in labels]
    has_attention = key % ATTENTION_EVERY == 0
    for sources in SOURCES if has_attention else SOURCES[:1]:
        capture = None
        if has_attention:
            capture = Capture(source_mask(prompt, len(prefix), sources), max(NUM_LAYERS))
        job = ScoreJob(
            key=key,
            prefix=prefix,
            continuations=continuations,
            capture=capture,
            distributions=None if rows[0] else RAW,
        )
        for row, token_ids, seen in zip(rows, continuations, await engine.score(job), strict=True):
            if not row:
                row.update(token_values(token_ids, seen))
            if capture is not None:
                row[sources] = grounding_values(seen, bool(capture.is_source[-1]))
    return rows


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
@click.option("--dtype", default="auto", show_default=True, help="What suits the processor.")
def main(pair: Path, output: Path, dtype: str) -> None:
    """Write the signals on the labels in the folder OUTPUT."""
    # Here, so that the rest can be imported where there is no torch.
    from specguard.backends.pytorch.loading import load_model

    questions = {row["problem"]: row["question"] for row in read_lines(output / "solutions.jsonl")}
    prefixes = {
        (row["problem"], row["step"]): tuple(row["prefix_token_ids"])
        for row in read_lines(output / "candidates.jsonl")
    }
    signals = Lines(output / "signals.jsonl")
    rest = to_do(read_lines(output / "labels.jsonl"), signals.records)
    click.echo(f"{len(rest)} labels")
    engines = {
        "target": load_model(str(pair / "coder-1.5b"), dtype=dtype),
        "draft": load_model(str(pair / "coder-0.5b"), dtype=dtype),
    }
    tokenizer = engines["target"].tokenizer
    began, num_done = time.monotonic(), 0
    for problem, of_problem in groupby(rest, key=lambda label: label["problem"]):
        prompt = tokenizer.encode_prompt(questions[problem], SYSTEM, thinking=False)
        for step, of_step in groupby(of_problem, key=lambda label: label["step"]):
            labels, prefix = list(of_step), prefixes[problem, step]
            assert prefix[: len(prompt.token_ids)] == prompt.token_ids
            seen = {
                role: asyncio.run(score(engine, prompt, prefix, labels))
                for role, engine in engines.items()
            }
            for index, label in enumerate(labels):
                row = {name: label[name] for name in LABEL_FIELDS}
                row["num_prefix"] = len(prefix)
                signals.append({**row, **{role: rows[index] for role, rows in seen.items()}})
            num_done += len(labels)
        for engine in engines.values():
            engine.release(problem)
        click.echo(f"{num_done} labels in {time.monotonic() - began:.0f} s")
    signals.close()


if __name__ == "__main__":
    main()

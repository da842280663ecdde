"""Measurements on the built-in pair: ``python -m specguard.models.tiny.measure --help``.

``accuracy`` compares methods on generated problems, ``signals`` says how well each signal tells
right draft steps from wrong ones.
"""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np

from specguard import Engine, load
from specguard.core import GREEDY, Boundary, Capture
from specguard.core.config import PRESETS
from specguard.core.embedders import load_embedder
from specguard.core.randomness import Purpose, problem_key, uniforms
from specguard.core.selector import select_medoid
from specguard.core.verifier import verify
from specguard.models.pairs import BUILT_IN_PAIR, find_pair
from specguard.models.tiny import problems
from specguard.models.tiny.checker import judge

STREAMS = {"calibration": problems.CALIBRATION, "held-out": problems.HELD_OUT}

count_option = click.option("--count", default=200, show_default=True, help="Problems to solve.")
stream_option = click.option(
    "--stream", type=click.Choice(list(STREAMS)), default="calibration", show_default=True
)


def methods() -> dict[str, dict[str, Any]]:
    """Settings by row of the table; "specguard" is the pair's own."""
    own = find_pair(BUILT_IN_PAIR).verifier
    presets = {name: replace(own, **changes) for name, changes in PRESETS.items()}
    return {
        "target, greedy": {"method": "target"},
        "draft, greedy": {"method": "draft"},
        "specguard": {},
        "specguard, k = 1, greedy draft": {"num_candidates": 1, "sampling": GREEDY},
        "specguard, draft verifies": {"verifier": replace(own, model="draft")},
        **{f"preset {name}": {"verifier": verifier} for name, verifier in presets.items()},
    }


@click.group()
def main() -> None:
    """Measure the built-in pair."""


@main.command()
@count_option
@stream_option
@click.option("--method", "names", multiple=True, help="A row of the table; all without it.")
def accuracy(count: int, stream: str, names: tuple[str, ...]) -> None:
    """Accuracy with a 95% Wilson interval, latency, acceptance and target tokens by method."""
    from scipy.stats import binomtest

    engine = load(BUILT_IN_PAIR)
    click.echo("| method | right | 95% interval | s / problem | steps accepted | target tokens |")
    click.echo("|---|---|---|---|---|---|")
    rows = methods()
    for name in names or tuple(rows):
        right, seconds, steps, accepted, written = 0, 0.0, 0, 0, 0
        for problem in islice(problems.stream(STREAMS[stream]), count):
            solution = engine.solve(problem.text, **rows[name])
            right += solution.answer == str(problem.answer)
            seconds += solution.stats.seconds
            steps += solution.stats.num_steps
            accepted += solution.stats.num_accepted_steps
            written += solution.stats.num_target_tokens
        low, high = binomtest(right, count).proportion_ci(method="wilson")
        is_plain = "method" in rows[name]
        share = "" if is_plain else f"{accepted / steps:.1%}"
        click.echo(
            f"| {name} | {right / count:.1%} | {low:.1%} - {high:.1%} | {seconds / count:.3f} "
            f"| {share} | {written / count:.1f} |"
        )


@main.command()
@count_option
@click.option("--output", type=click.Path(path_type=Path), help="Write one JSON line a step.")
def signals(count: int, output: Path | None) -> None:
    """AUC of each signal for "this draft step is right", on calibration problems.

    Steps are sampled after right prefixes; the final answer is left out.
    """
    from scipy.stats import mannwhitneyu

    engine = load(BUILT_IN_PAIR)
    rows = list(_judged_steps(engine, count))
    if output is not None:
        output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    is_right = np.array([row["is_right"] for row in rows])
    click.echo(f"{len(rows)} steps, {is_right.mean():.1%} right")
    click.echo("| signal | draft | target |")
    click.echo("|---|---|---|")
    for name in rows[0]["draft"]:
        aucs = []
        for role in "draft", "target":
            values = np.array([row[role][name] for row in rows])
            lower_is_better = name.startswith("entropy") or name == "sink_mass"
            values = -values if lower_is_better else values
            comparison = mannwhitneyu(values[is_right], values[~is_right])
            aucs.append(comparison.statistic / is_right.sum() / (~is_right).sum())
        click.echo(f"| {name} | {aucs[0]:.3f} | {aucs[1]:.3f} |")


def _judged_steps(engine: Engine, count: int) -> Iterator[dict[str, Any]]:
    """Both models' signals on the draft's selected step after every right prefix."""
    models = {"draft": engine.draft, "target": engine.target}
    config, verifier = engine.config, engine.config.verifier
    embed = load_embedder(config.selector)
    for problem in islice(problems.stream(problems.CALIBRATION), count):
        for index in range(len(problem.steps) - 1):
            prefix = "".join(step + problems.DELIMITER for step in problem.steps[:index])
            row: dict[str, Any] = {}
            selected, consistency = None, 1.0
            for role, model in models.items():
                assert model is not None
                prompt = model.tokenizer.encode_prompt(problem.text, None, False)
                with closing(model.start(prompt)) as sequence:
                    if prefix:
                        model.extend([sequence], [model.tokenizer.encode(prefix)])
                    if selected is None:
                        boundary = Boundary(config.delimiter, model.tokenizer.eos_ids, 128)
                        key, k = problem_key(problem.text), config.num_candidates
                        draws = uniforms(config.seed, key, Purpose.DRAFT, index, k, 128)
                        [candidates] = model.propose(
                            [sequence], k, config.step_sampling, boundary, draws[np.newaxis]
                        )
                        selection = select_medoid(candidates, embed)
                        selected = candidates[selection.index]
                        consistency = selection.similarities[selection.index]
                    is_source = np.ones(len(sequence.token_ids), dtype=np.bool_)
                    is_source[: len(prompt.token_ids)] = False
                    is_source[slice(*prompt.problem_span)] = True
                    is_source[0] = False
                    capture = Capture(is_source, verifier.num_layers, verifier.epsilon)
                    [seen] = model.extend([sequence], [selected.token_ids], [capture])
                row[role] = dict(verify(seen, capture, consistency, verifier).signals)
            assert selected is not None
            judgement = judge(problem, problem.steps[:index], selected.text.strip())
            yield {
                "is_right": judgement.is_right,
                "kind": judgement.kind,
                "text": selected.text,
                **row,
            }


if __name__ == "__main__":
    main()

"""``specguard bench peers``: this project beside other libraries, same weights and machine."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from rich.progress import Progress

from specguard import UsageError
from specguard.bench.peers import (
    Race,
    Sources,
    built_in_race,
    lines_table,
    missing_peers,
    replayed_race,
)
from specguard.bench.random_pair import Shape, write_random_model
from specguard.bench.tables import machine, machine_line
from specguard.cli.options import numbers
from specguard.cli.output import console
from specguard.loading import configure
from specguard.models.pairs import BUILT_IN_PAIR, find_pair


@click.command()
@click.option("--backends", default="cpu,mlx", show_default=True, help="Separated by commas.")
@click.option(
    "--count", type=click.IntRange(min=1), default=10, show_default=True, help="Problems to solve."
)
@click.option(
    "--weights",
    type=click.Choice(["built-in", "random"]),
    help="One part alone: the built-in pair, or random weights with replayed decisions.",
)
@click.option("--layers", default=24, show_default=True, help="Of both random models.")
@click.option("--hidden", default=512, show_default=True, help="Hidden size of the random target.")
@click.option("--draft-hidden", default=256, show_default=True, help="Of the random draft.")
@click.option("--tokens", default=192, show_default=True, help="Of a replayed solution, about.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Likewise."
)
@click.option("--k", "counts", default="1,4,16", show_default=True, help="Candidates to replay.")
@click.option(
    "--acceptance", "acceptances", default="0.5,0.7,0.9", show_default=True, help="To replay."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of the tables.")
def peers(
    backends: str,
    count: int,
    weights: str | None,
    layers: int,
    hidden: int,
    draft_hidden: int,
    tokens: int,
    rounds: int,
    counts: str,
    acceptances: str,
    as_json: bool,
) -> None:
    """Compare decoding with transformers' and mlx-lm's, in single precision.

    First the built-in pair, greedily. Then random weights of a realistic shape, where step lengths
    and decisions are replayed at each acceptance rate of steps (of tokens, for sd); peers write the
    same number of tokens. Times include the reading of the prompt.
    """
    names = [name.strip() for name in backends.split(",") if name.strip()]
    candidates = numbers(counts, "--k", int)
    shares = numbers(acceptances, "--acceptance", float)
    if not names:
        raise UsageError("no backend is given")
    if any(number < 1 for number in candidates) or tokens < 1:
        raise UsageError("--k and --tokens must be at least 1")
    if any(not 0 <= share <= 1 for share in shares):
        raise UsageError("--acceptance lies in [0, 1]")
    shapes = Shape(layers, draft_hidden), Shape(layers, hidden)
    found = {}
    if weights != "random":
        pair = find_pair(BUILT_IN_PAIR)
        sources = Sources(*pair.sources("torch"), pair.system_prompt)
        found["built-in"] = _run(built_in_race(sources, configure(pair), names), count)
    if weights != "built-in":
        with _random_pair(*shapes) as sources:
            race = replayed_race(sources, names, tokens, candidates, shares)
            found["random"] = _run(race, rounds)
    about = machine()
    if as_json:
        tables = {name: [asdict(line) for line in race.lines()] for name, race in found.items()}
        data = {"machine": about, "not_installed": missing_peers(), "tables": tables}
        click.echo(json.dumps(data))
        return
    click.echo(f"{machine_line(about)}; medians over problems.")
    for name, race in found.items():
        title = "The built-in pair, greedy"
        if name == "random":
            title = (
                f"Random weights, {layers} layers, hidden size {hidden} (draft {draft_hidden}), "
                "replayed steps and decisions"
            )
        click.echo(f"\n{title}:\n\n{lines_table(race.lines(), missing_peers())}", nl=False)


def _run(race: Race, count: int) -> Race:
    from specguard.models.tiny import problems

    texts = [problem.text for problem in islice(problems.stream(problems.HELD_OUT), count)]
    err = console(stderr=True)
    with Progress(console=err, disable=not err.is_terminal) as progress:
        race.add(texts[0], is_warm_up=True)
        for text in progress.track(texts, description="solving"):
            race.add(text)
    return race


@contextmanager
def _random_pair(draft: Shape, target: Shape) -> Iterator[Sources]:
    with TemporaryDirectory() as folder:
        yield Sources(
            str(write_random_model(Path(folder) / "draft", draft, seed=0)),
            str(write_random_model(Path(folder) / "target", target, seed=1)),
        )

"""Whole-problem accuracy of a network, greedy, and where its first wrong step goes wrong.

``python -m recipes.tiny.evaluate --model target --run runs/target --count 2000``
"""

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import click
import torch

from recipes.tiny.checker import judge
from recipes.tiny.data import Coder, make_coder
from recipes.tiny.decoding import decode
from recipes.tiny.network import Network
from recipes.tiny.recipe import RECIPES, load_network
from specguard.models.tiny import problems

STREAMS = {"calibration": problems.CALIBRATION, "held-out": problems.HELD_OUT}


@dataclass(frozen=True, slots=True)
class Result:
    """How many problems end in the right answer, and what the first wrong steps are.

    ``places`` counts them by kind of sentence and place in the step, ``kinds`` by kind of error;
    ``steps`` and ``right_steps`` count steps up to the first wrong one.
    """

    num_right: int
    steps: int
    right_steps: int
    places: dict[str, int]
    kinds: dict[str, int]
    wrong: tuple[tuple[problems.Problem, str], ...]


def solve(network: Network, coder: Coder, stream: int, count: int, start: int = 0) -> Result:
    """Solve ``count`` problems of a stream from number ``start`` on."""
    batch = list(islice(problems.stream(stream, start), count))
    was_training = network.training
    network.eval()
    outputs = decode(network, [coder.prompt(problem) for problem in batch], coder.end)
    network.train(was_training)
    right, steps, right_steps = 0, 0, 0
    places, kinds, wrong = Counter[str](), Counter[str](), []
    for problem, ids in zip(batch, outputs, strict=True):
        text = coder.tokenizer.decode(ids)
        number, kind = first_wrong(problem, text)
        right_steps += number
        steps += number + (kind is not None)
        if text.endswith(f"\\boxed{{{problem.answer}}}."):
            right += 1
            continue
        wrong.append((problem, text))
        places[first_place(problem, text)] += 1
        kinds[kind or "stops early"] += 1
    return Result(
        right,
        steps,
        right_steps,
        dict(places.most_common()),
        dict(kinds.most_common()),
        tuple(wrong),
    )


def first_wrong(problem: problems.Problem, text: str) -> tuple[int, str | None]:
    """How many steps come before the first wrong one, and what is wrong with that (or None)."""
    steps = text.split(problems.DELIMITER)
    for number, step in enumerate(steps):
        judgement = judge(problem, steps[:number], step)
        if judgement.kind is not None:
            return number, judgement.kind.value
    return len(steps), None


def first_place(problem: problems.Problem, text: str) -> str:
    """The first difference from the reference: the sentence's kind, and where in the step it is."""
    steps = text.split(problems.DELIMITER)
    for index, wanted in enumerate(problem.steps):
        got = steps[index] if index < len(steps) else ""
        if wanted == got:
            continue
        is_last = index == len(problem.steps) - 1
        kind = problem.question.kind if is_last else problem.sentences[index].kind
        sentence = problem.question.text if is_last else problem.sentences[index].text
        if not got.startswith(sentence):
            return f"{kind}: sentence"
        pieces = zip(wanted[len(sentence) :].split(), got[len(sentence) :].split(), strict=False)
        for position, (right, wrong) in enumerate(pieces):
            if right != wrong:
                is_number = right.strip(",.").isdecimal()
                place = ("look-up" if position == 2 else "number") if is_number else "word"
                return f"{kind}: {place}"
        return f"{kind}: length"
    return "ending"


@click.command()
@click.option("--model", "name", type=click.Choice(list(RECIPES)), required=True)
@click.option("--run", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--stream", type=click.Choice(list(STREAMS)), default="calibration")
@click.option("--count", default=500, show_default=True)
@click.option("--bf16/--float32", default=True, show_default=True, help="Round the weights first.")
@click.option("--threads", type=int, default=None, help="Threads that torch may use.")
def main(name: str, run: Path, stream: str, count: int, bf16: bool, threads: int | None) -> None:
    """Greedy accuracy of a run's last checkpoint with a 95% Wilson interval."""
    from scipy.stats import binomtest

    if threads is not None:
        torch.set_num_threads(threads)
    coder = make_coder()
    network = load_network(RECIPES[name], coder.lexicon, run)
    if bf16:
        for tensor in network.state_dict().values():
            tensor.copy_(tensor.to(torch.bfloat16))
    result = solve(network, coder, STREAMS[stream], count)
    low, high = binomtest(result.num_right, count).proportion_ci(method="wilson")
    click.echo(f"{name}: {result.num_right / count:.1%} of {count} right ({low:.1%} - {high:.1%})")
    click.echo(f"steps right, up to the first wrong one: {result.right_steps / result.steps:.2%}")
    click.echo(f"what is wrong first: {result.kinds}")
    click.echo(f"where: {result.places}")
    for problem, text in result.wrong[:3]:
        click.echo(f"\n{problem.text}\n---\n{text}\n--- {problem.answer}")


if __name__ == "__main__":
    main()

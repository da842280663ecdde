"""Measurements of the backends: ``python -m specguard.backends.measure --help``.

``compare`` solves the same problems on two backends, ``memory`` says how much one takes,
``decoding`` times plain decoding beside the backend's own library. What the capture of attention
costs, ``specguard bench context`` says.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from statistics import median
from typing import Any

import click

from specguard import Engine, load
from specguard.bench.memory import peak_mebibytes
from specguard.core import GREEDY, Solution
from specguard.core.config import PRESETS
from specguard.core.records import StepRecord
from specguard.models.pairs import BUILT_IN_PAIR, find_pair
from specguard.models.tiny import problems

count_option = click.option("--count", default=100, show_default=True, help="Problems to solve.")
backend_option = click.option("--backend", default="mlx", show_default=True)


@click.group()
def main() -> None:
    """Measure the backends on held-out problems of the built-in pair."""


@main.command()
@count_option
@click.option("--backends", "names", nargs=2, default=("cpu", "mlx"), show_default=True)
def compare(count: int, names: tuple[str, str]) -> None:
    """Solve problems on two backends in turn: equality of everything decided, time, memory.

    Solutions are equal where every token of every candidate, every decision and the finish reasons
    are. Others are listed, with the distance of both scores from the threshold.
    """
    engines = [load(BUILT_IN_PAIR, backend=name, dtype="float32") for name in names]
    paper = replace(find_pair(BUILT_IN_PAIR).verifier, **PRESETS["paper"])
    modes: dict[str, dict[str, Any]] = {
        "sampled": {"num_candidates": 8},
        "greedy": {"num_candidates": 8, "sampling": GREEDY},
        "preset paper": {"num_candidates": 8, "verifier": paper, "selector": "draft"},
        "target, greedy": {"method": "target"},
    }
    click.echo("| settings | equal | " + " | ".join(f"{n} s / problem | tokens/s" for n in names))
    click.echo("|" + "---|" * 6)
    for mode, settings in modes.items():
        seconds, num_tokens, num_equal, different = [0.0, 0.0], [0, 0], 0, []
        for number, problem in enumerate(_held_out(count)):
            solutions = [engine.solve(problem.text, detail=True, **settings) for engine in engines]
            for i, solution in enumerate(solutions):
                seconds[i] += solution.stats.seconds
                num_tokens[i] += solution.stats.num_tokens
            if decided(solutions[0]) == decided(solutions[1]):
                num_equal += 1
            else:
                different.append(f"problem {number}: {_first_difference(*solutions)}")
        figures = " | ".join(
            f"{spent / count:.3f} | {tokens / spent:.0f}"
            for spent, tokens in zip(seconds, num_tokens, strict=True)
        )
        click.echo(f"| {mode} | {num_equal} of {count} | {figures} |")
        for line in different:
            click.echo(line)
    for name in names:
        command = [sys.executable, "-m", "specguard.backends.measure", "memory", "--backend", name]
        peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        click.echo(f"{name}: {peak}")


@main.command()
@backend_option
def memory(backend: str) -> None:
    """Memory of this process after loading, and its peak over ten problems."""
    import psutil

    engine = load(BUILT_IN_PAIR, backend=backend)
    loaded = psutil.Process().memory_info().rss / 2**20
    for problem in _held_out(10):
        engine.solve(problem.text)
    click.echo(f"{loaded:.0f} MiB resident once loaded, {peak_mebibytes():.0f} MiB at the peak")


@main.command()
@count_option
@backend_option
def decoding(count: int, backend: str) -> None:
    """Time plain target decoding beside transformers' or mlx-lm's generate, problem by problem.

    The ratio is the median over problems.
    """
    engine = load(BUILT_IN_PAIR, backend=backend, dtype="float32", method="target")
    assert engine.target is not None
    generate = _mlx_lm_generate if backend == "mlx" else _transformers_generate
    peer = generate(engine)
    ours, theirs = [], []
    num_tokens = num_equal = 0
    for problem in _held_out(count):
        prompt = engine.target.tokenizer.encode_prompt(problem.text, None, False)
        started = time.perf_counter()
        text = peer(list(prompt.token_ids))
        theirs.append(time.perf_counter() - started)
        solution = engine.solve(problem.text)
        ours.append(solution.stats.seconds)
        num_tokens += solution.stats.num_tokens
        num_equal += text == solution.text
    ratio = median(own / peers for own, peers in zip(ours, theirs, strict=True))
    click.echo(
        f"{count} problems, {num_tokens} tokens, {num_equal} texts equal. generate: "
        f"{sum(theirs):.1f} s, specguard --method target: {sum(ours):.1f} s, ratio {ratio:.3f}"
    )


def _held_out(count: int) -> Iterator[problems.Problem]:
    return islice(problems.stream(problems.HELD_OUT), count)


def decided(solution: Solution) -> tuple[Any, ...]:
    """All that was decided on the way to a solution, and no score."""
    return solution.text, solution.finish_reason, [_decided_step(step) for step in solution.steps]


def _decided_step(step: StepRecord) -> tuple[Any, ...]:
    candidates = step.candidates or ()
    tokens = step.tokens.token_ids if step.tokens else ()
    return (
        step.decision,
        step.text,
        step.selected,
        tokens,
        [(candidate.token_ids, candidate.finish) for candidate in candidates],
    )


def _first_difference(one: Solution, other: Solution) -> str:
    for ours, theirs in zip(one.steps, other.steps, strict=False):
        if _decided_step(ours) != _decided_step(theirs):
            scores = [
                abs(step.scores["ensemble"] - step.threshold)
                for step in (ours, theirs)
                if step.threshold is not None
            ]
            return (
                f"step {ours.index}: {ours.decision} {ours.text!r}, {theirs.decision} "
                f"{theirs.text!r}; distances from the threshold {scores}"
            )
    return f"finish: {one.finish_reason}, {other.finish_reason}"


def _transformers_generate(engine: Engine) -> Callable[[list[int]], str]:
    import torch
    from transformers import AutoModelForCausalLM

    assert engine.target is not None
    tokenizer = engine.target.tokenizer
    model = AutoModelForCausalLM.from_pretrained(engine.target.name, dtype=torch.float32)

    def generate(token_ids: list[int]) -> str:
        inputs = torch.tensor([token_ids])
        output = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=512, do_sample=False
        )
        return tokenizer.decode(output[0, inputs.shape[1] :].tolist())

    return generate


def _mlx_lm_generate(engine: Engine) -> Callable[[list[int]], str]:
    import mlx.core as mx
    import mlx_lm

    assert engine.target is not None
    model, tokenizer = mlx_lm.load(engine.target.name)
    model.set_dtype(mx.float32)
    tokenizer.eos_token_ids = set(engine.target.tokenizer.eos_ids)

    def generate(token_ids: list[int]) -> str:
        text: str = mlx_lm.generate(model, tokenizer, token_ids, max_tokens=512)
        return text

    return generate


if __name__ == "__main__":
    main()

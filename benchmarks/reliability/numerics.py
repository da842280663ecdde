"""Numbers beside NumPy in float64: ``python -m benchmarks.reliability.numerics --help``.

Small Llamas of random weights, on every backend that is installed: log-probabilities and attention
of random steps behind random contexts, what is drawn against the enumerated distribution, and a
context of thousands of tokens that was read step by step.
"""

import asyncio
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from specguard.backends.local.engine import LocalEngine
from specguard.core import Capture, Engine, Observation, Sampling, ScoreJob
from specguard.core.engine import FloatArray
from specguard.core.grounding import grounding
from tests.conftest import make_checkpoint
from tests.engines import load_local
from tests.reference import ReferenceEngine, draw, warp

BACKENDS = ("torch", "mlx")
_TOKENS = (3, 900)  # ids of the built-in tokenizer that are plain text
_EDGE = 1e-5  # of an edge of the distribution: there, rounding decides


@dataclass(slots=True)
class Errors:
    """The largest differences, by what they are of, and how many cases they are from."""

    largest: dict[str, float] = field(default_factory=dict)
    cases: int = 0

    def add(self, name: str, found: Any, expected: Any) -> None:
        """Look at one array."""
        difference = float(np.abs(np.asarray(found, dtype=float) - expected).max(initial=0.0))
        self.largest[name] = max(self.largest.get(name, 0.0), difference)


def compare_scores(engine: Engine, plain: ReferenceEngine, cases: int, seed: int) -> Errors:
    """Random steps behind random contexts: log-probabilities, entropies, attention, grounding."""
    rng, errors = np.random.default_rng(seed), Errors()
    for number in range(cases):
        prefix = tuple(rng.integers(*_TOKENS, rng.integers(2, 80)).tolist())
        steps = [
            tuple(rng.integers(*_TOKENS, rng.integers(1, 30)).tolist())
            for _ in range(rng.integers(1, 4))
        ]
        is_source = rng.random(len(prefix)) < rng.choice([0.5, 1.1])
        epsilon = _apart(plain, prefix, steps)
        capture = Capture(is_source, int(rng.integers(1, 4)), epsilon)
        job = ScoreJob(key=number, prefix=prefix, continuations=tuple(steps), capture=capture)
        for found, expected in zip(_scored(engine, job), _scored(plain, job), strict=True):
            _compare(errors, found, expected, bool(is_source[-1]))
        engine.release(number)
        errors.cases += 1
    return errors


def _compare(errors: Errors, found: Observation, expected: Observation, is_source: bool) -> None:
    errors.add("log-probability", found.token_logprobs, expected.token_logprobs)
    errors.add("entropy", found.token_entropies, expected.token_entropies)
    assert found.blocks is not None
    assert expected.blocks is not None
    for block, wanted in zip(found.blocks, expected.blocks, strict=True):
        for name in "source_mass", "sink_mass", "step":
            errors.add("attention block", getattr(block, name), getattr(wanted, name))
    errors.add(
        "grounding",
        grounding(found.blocks, is_source, 0.5),
        grounding(expected.blocks, is_source, 0.5),
    )


def _apart(plain: ReferenceEngine, prefix: tuple[int, ...], steps: list[tuple[int, ...]]) -> float:
    """An epsilon near the paper's with no weight beside it, so that rounding drops none."""
    weights = np.concatenate(
        [layer.ravel() for step in steps for layer in plain.model([*prefix, *step]).attention]
    )
    near = np.sort(np.append(weights[(weights > 0.005) & (weights < 0.02)], (0.005, 0.02)))
    widest = int(np.diff(near).argmax())
    return float(near[widest : widest + 2].mean())


def _scored(engine: Engine, job: ScoreJob) -> list[Observation]:
    return list(asyncio.run(_score(engine, job)))


async def _score(engine: Engine, job: ScoreJob) -> Any:
    return await engine.score(job)


def compare_draws(
    engine: LocalEngine, make: Callable[[FloatArray], Any], cases: int, seed: int
) -> Errors:
    """Random logits: temperature and top-p against enumeration, draws against the inverse CDF.

    ``make`` makes a tensor of the framework's.
    """
    rng, errors = np.random.default_rng(seed), Errors()
    for _ in range(cases):
        logits = rng.normal(scale=rng.choice([0.3, 2.0, 8.0]), size=(1, 1000)).astype(np.float32)
        sampling = Sampling(float(rng.uniform(0.2, 2.0)), float(rng.choice([0.5, 0.8, 0.95, 1.0])))
        expected = warp(logits[0].astype(float), sampling)
        if _is_at_an_edge(logits[0].astype(float), sampling):
            continue
        errors.add(
            "probability",
            engine.layer.numpy(engine.layer.warp(make(logits), sampling))[0],
            expected,
        )
        uniforms = rng.random(20).astype(np.float32)
        cdf = np.cumsum(expected)
        clear = [number for number in uniforms if np.abs(cdf - number).min() > _EDGE]
        drawn = engine.layer.sample(
            make(logits), [0] * len(clear), sampling, np.array(clear, dtype=np.float32)
        )
        wanted = [draw(expected, float(number)) for number in clear]
        differing = sum(a != b for a, b in zip(engine.layer.read(drawn), wanted, strict=True))
        errors.largest["draws that differ"] = errors.largest.get("draws that differ", 0) + differing
        errors.cases += 1
    return errors


def _is_at_an_edge(logits: FloatArray, sampling: Sampling) -> bool:
    """Whether rounding decides what top-p keeps."""
    ordered = np.sort(warp(logits, Sampling(sampling.temperature, 1.0)))[::-1]
    return bool(sampling.top_p < 1 and np.abs(np.cumsum(ordered) - sampling.top_p).min() < _EDGE)


def read_long(engine: Engine, plain: ReferenceEngine, tokens: int, seed: int) -> Errors:
    """A step behind a long context that grew step by step, and another read at once."""
    rng, errors = np.random.default_rng(seed), Errors(cases=1)
    prefix = tuple(rng.integers(*_TOKENS, tokens).tolist())
    step = tuple(rng.integers(*_TOKENS, 30).tolist())
    first = 0
    while first < tokens:
        end = min(tokens, first + int(rng.integers(20, 200)))
        if first:
            job = ScoreJob(key="grown", prefix=prefix[:first], continuations=(prefix[first:end],))
            _scored(engine, job)
        first = end
    expected = _scored(plain, ScoreJob(key="plain", prefix=prefix, continuations=(step,)))[0]
    for key in "grown", "at once":
        found = _scored(engine, ScoreJob(key=key, prefix=prefix, continuations=(step,)))[0]
        errors.add(f"log-probability, context {key}", found.token_logprobs, expected.token_logprobs)
        engine.release(key)
    return errors


def frameworks(backends: tuple[str, ...]) -> dict[str, Callable[[FloatArray], Any]]:
    """How to make a tensor, by backend."""
    found: dict[str, Callable[[FloatArray], Any]] = {}
    if "torch" in backends:
        import torch

        found["torch"] = torch.from_numpy
    if "mlx" in backends:
        import mlx.core as mx

        found["mlx"] = mx.array
    return found


@click.command(context_settings={"show_default": True})
@click.option("--cases", type=click.IntRange(min=1), default=1000)
@click.option("--context", type=click.IntRange(min=2), default=8192, help="Tokens of the long one.")
@click.option("--seed", type=int, default=0)
@click.option("--backend", "backends", multiple=True, type=click.Choice(BACKENDS), default=BACKENDS)
def main(cases: int, context: int, seed: int, backends: tuple[str, ...]) -> None:
    """Print the largest differences of each backend from float64."""
    with tempfile.TemporaryDirectory() as kept:
        folder = make_checkpoint(Path(kept) / "small")
        deep = make_checkpoint(
            Path(kept) / "long",
            max_position_embeddings=2 * context,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
        plain, long = ReferenceEngine.load(folder), ReferenceEngine.load(deep)
        long.context_limit = 2 * context
        click.echo("| backend | cases | largest difference |\n|---|---|---|")
        for name, make in frameworks(backends).items():
            engine = load_local(name, folder)
            for errors in (
                compare_scores(engine, plain, cases, seed),
                compare_draws(engine, make, cases, seed),
                read_long(load_local(name, deep), long, context, seed),
            ):
                told = ", ".join(f"{of}: {value:.1e}" for of, value in errors.largest.items())
                click.echo(f"| {name} | {errors.cases} | {told} |")


if __name__ == "__main__":
    main()

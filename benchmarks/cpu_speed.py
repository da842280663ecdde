"""A model on this CPU, beside transformers' generate: ``python -m benchmarks.cpu_speed --help``.

Both run on the same weights in the same process, in turn, so that what else the machine is doing
meets both alike.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from statistics import median
from typing import Any

import click
import numpy as np

from specguard import load
from specguard.backends.pytorch.layer import TorchLayer
from specguard.bench.tables import as_table, machine, machine_line
from specguard.core import GREEDY, Boundary, Engine, GenerateJob, ScoreJob
from specguard.core.runner import Runner

PROMPT_LENGTH = 96
Decode = Callable[[int, int], None]  # so many rows, so many tokens each


def decode_of(engine: Engine, runner: Runner, prompts: Sequence[tuple[int, ...]]) -> Decode:
    """Greedy decoding of several problems at once by an engine."""

    def job(key: int, num_tokens: int) -> GenerateJob:
        return GenerateJob(
            key=key,
            prefix=prompts[key],
            sampling=GREEDY,
            boundary=Boundary("", frozenset(), num_tokens),
            uniforms=np.zeros((1, num_tokens), dtype=np.float32),
        )

    async def decode(num_rows: int, num_tokens: int) -> None:
        await asyncio.gather(*(engine.generate(job(key, num_tokens)) for key in range(num_rows)))
        for key in range(num_rows):
            engine.release(key)

    return lambda num_rows, num_tokens: runner.run(decode(num_rows, num_tokens))


def peer_decode_of(model: str, dtype: Any, prompts: Sequence[tuple[int, ...]]) -> Decode:
    """Greedy decoding by transformers' ``generate``, of a model of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    peer.generation_config.eos_token_id = None

    def decode(num_rows: int, num_tokens: int) -> None:
        inputs = torch.tensor(prompts[:num_rows])
        mask = torch.ones_like(inputs)
        peer.generate(inputs, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)

    return decode


def seconds_per_step(decode: Decode, num_rows: int, num_tokens: int) -> float:
    """Of a pass of one token a row: what is read of the prompt before the first is left out."""
    seconds = []
    for length in 1, num_tokens + 1:
        started = time.perf_counter()
        decode(num_rows, length)
        seconds.append(time.perf_counter() - started)
    return (seconds[1] - seconds[0]) / num_tokens


def seconds_to_read(
    engine: Engine, runner: Runner, prefix: tuple[int, ...], tokens: tuple[int, ...]
) -> float:
    """Of scoring a step behind a prefix that has been read."""

    def score(token_ids: tuple[int, ...]) -> Coroutine[Any, Any, Any]:
        return engine.score(ScoreJob(key="read", prefix=prefix, continuations=(token_ids,)))

    runner.run(score(tokens[:1]))
    started = time.perf_counter()
    runner.run(score(tokens))
    return time.perf_counter() - started


_POSITIVE = click.IntRange(min=1)


@click.command(context_settings={"show_default": True})
@click.argument("model")
@click.option("--dtype", default="auto")
@click.option("--tokens", type=_POSITIVE, default=24, help="Of a row.")
@click.option("--rows", type=click.IntRange(min=2), default=8, help="Problems at once.")
@click.option("--read", type=_POSITIVE, default=30, help="Tokens that are scored in one pass.")
@click.option("--rounds", type=_POSITIVE, default=5)
def main(model: str, dtype: str, tokens: int, rows: int, read: int, rounds: int) -> None:
    """Decode and score with MODEL, a folder, on the CPU; medians over rounds."""
    engine = load(target=model, backend="cpu", dtype=dtype, method="target").target
    assert engine is not None
    layer = getattr(engine, "layer", None)
    assert isinstance(layer, TorchLayer)
    drawn = np.random.default_rng(0).choice(
        sorted(engine.tokenizer.vocabulary.values()), size=(rows, PROMPT_LENGTH + read)
    )
    texts = [tuple(row) for row in drawn.tolist()]
    prompts = [text[:PROMPT_LENGTH] for text in texts]
    with Runner() as runner:
        own = decode_of(engine, runner, prompts)
        peer = peer_decode_of(model, layer.number_type, prompts)
        own(1, 2)
        peer(1, 2)

        def measure() -> Iterator[float]:
            for num_rows in 1, rows:
                for decode in own, peer:
                    yield seconds_per_step(decode, num_rows, tokens)
            yield seconds_to_read(engine, runner, prompts[0], texts[0][PROMPT_LENGTH:])

        rounds_of_seconds = [tuple(measure()) for _ in range(rounds)]
    about = {**machine(), "model": model, "number type": str(layer.number_type)}
    click.echo(f"{machine_line(about)}\n\n{table(rounds_of_seconds, rows, read)}", nl=False)


def table(rounds: Sequence[tuple[float, ...]], rows: int, read: int) -> str:
    """Medians, and medians of the ratios of each round."""
    lines = []
    for place, num_rows in (0, 1), (2, rows):
        own, peer = (median(num_rows / each[place + side] for each in rounds) for side in (0, 1))
        ratio = median(each[place + 1] / each[place] for each in rounds)
        name = f"{num_rows} row{'s' * (num_rows > 1)}, tokens/s"
        lines.append([name, f"{own:.1f}", f"{peer:.1f}", f"{ratio:.2f}"])
    steps = median(each[4] / each[0] for each in rounds)
    lines.append([f"scoring {read} tokens, steps of one row", f"{steps:.2f}", "", ""])
    return as_table(["", "specguard", "transformers generate", "ratio"], lines)


if __name__ == "__main__":
    main()

"""How the cost of a step grows with the text before it: ``python -m benchmarks.context --help``.

A step costs what its tokens cost, and attention to the context: time may grow with the context in a
straight line, and by attention alone.
"""

import json
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

from benchmarks.random_pair import write_random_model
from specguard import load
from specguard.backends.registry import choose_backend
from specguard.bench.tables import as_table, machine, machine_line
from specguard.core import (
    GREEDY,
    Boundary,
    Candidate,
    Capture,
    Engine,
    GenerateJob,
    Sampling,
    ScoreJob,
    UsageError,
)
from specguard.core.runner import Runner

STEP_LENGTH = 32
JOBS = ("generate", "generate k", "accept", "score", "score captured", "score k")
_KEY = "context"


@dataclass(frozen=True, slots=True)
class ContextLine:
    """Median seconds of each of `JOBS` behind ``length`` tokens.

    ``capture_ratio`` is the median, over rounds, of reading a step with capture to reading it
    without.
    """

    length: int
    seconds: dict[str, float]
    capture_ratio: float

    @property
    def step_seconds(self) -> float:
        """A step with one candidate: generate, verify with attention."""
        return self.seconds["generate"] + self.seconds["score captured"]


def time_contexts(
    engine: Engine, lengths: Sequence[int], num_candidates: int, num_rounds: int, num_layers: int
) -> Iterator[ContextLine]:
    """A line for each length, shortest first; the engine has read the context already.

    Attention is captured in the last ``num_layers`` layers, with the first quarter of the context
    as sinks.

    Raises:
        UsageError: a length that is not positive or leaves no room for a step and a token.
    """
    most = engine.context_limit - STEP_LENGTH - 1
    if min(lengths) < 1 or max(lengths) > most:
        raise UsageError(f"contexts must lie between 1 and {most} tokens")
    rng = np.random.default_rng(0)
    text = tuple(rng.choice(list(engine.tokenizer.vocabulary.values()), size=most).tolist())
    with Runner() as runner:
        for length in sorted(set(lengths)):
            capture = Capture(np.arange(length) >= length // 4, num_layers)
            _, *rounds = [
                _time_round(runner, engine, text[:length], num_candidates, capture)
                for _ in range(num_rounds + 1)
            ]
            yield ContextLine(
                length,
                {job: median(seconds[job] for seconds in rounds) for job in JOBS},
                median(seconds["score captured"] / seconds["score"] for seconds in rounds),
            )
    engine.release(_KEY)


def _time_round(
    runner: Runner, engine: Engine, prefix: tuple[int, ...], count: int, capture: Capture
) -> dict[str, float]:
    """Each job once; what was before is forgotten again by the next one."""
    seconds: dict[str, float] = {}

    def timed(name: str, work: Coroutine[Any, Any, Any]) -> Any:
        started = time.perf_counter()
        result = runner.run(work)
        seconds[name] = time.perf_counter() - started
        return result

    async def generate(
        prefix: tuple[int, ...], count: int, sampling: Sampling, length: int
    ) -> list[Candidate]:
        draws = np.random.default_rng(len(prefix)).random((count, length), dtype=np.float32)
        job = GenerateJob(
            key=_KEY,
            prefix=prefix,
            sampling=sampling,
            boundary=Boundary("", frozenset(), length),
            num_candidates=count,
            uniforms=draws,
        )
        return await engine.generate(job)

    def score(candidates: Sequence[Candidate], capture: Capture | None) -> Any:
        token_ids = tuple(candidate.token_ids for candidate in candidates)
        return engine.score(
            ScoreJob(key=_KEY, prefix=prefix, continuations=token_ids, capture=capture)
        )

    timed("generate", generate(prefix, 1, GREEDY, STEP_LENGTH))
    candidates = timed("generate k", generate(prefix, count, Sampling(), STEP_LENGTH))
    # To go on behind a candidate takes its keys and values over, and a pass for one token.
    timed("accept", generate((*prefix, *candidates[-1].token_ids), 1, GREEDY, 1))
    timed("score", score(candidates[:1], None))
    timed("score captured", score(candidates[:1], capture))
    timed("score k", score(candidates, None))
    return seconds


def context_table(lines: Sequence[ContextLine]) -> str:
    """Milliseconds by context; what capture costs, and what 1,000 more tokens add to a step, in ms.

    That is the same from line to line where time grows in a straight line.
    """
    rows = []
    for before, line in zip([None, *lines], lines, strict=False):
        growth = ""
        if before is not None:
            more = line.step_seconds - before.step_seconds
            growth = f"{more * 1e6 / (line.length - before.length):.3f}"
        cells = [f"{line.seconds[job] * 1e3:.2f}" for job in JOBS]
        cells += [f"{line.capture_ratio:.3f}", f"{line.step_seconds * 1e3:.2f}", growth]
        rows.append([str(line.length), *cells])
    columns = ("context", *JOBS, "captured / plain", "step, k = 1", "ms / 1,000 more tokens")
    return as_table(columns, rows)


_POSITIVE = click.IntRange(min=1)


@click.command(context_settings={"show_default": True})
@click.option("--backend", default="auto")
@click.option(
    "--length",
    "lengths",
    type=_POSITIVE,
    multiple=True,
    default=(512, 1024, 2048, 4096, 8192),
    help="Tokens of context; may be given several times.",
)
@click.option("--layers", type=_POSITIVE, default=24, help="Of the random model.")
@click.option("--hidden", type=_POSITIVE, default=256, help="Its hidden size.")
@click.option("--k", "count", type=_POSITIVE, default=4, help="Candidates.")
@click.option("--rounds", type=_POSITIVE, default=5, help="Of every timing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of the table.")
def main(
    backend: str,
    lengths: tuple[int, ...],
    layers: int,
    hidden: int,
    count: int,
    rounds: int,
    as_json: bool,
) -> None:
    """Time the jobs of a step of 32 tokens behind contexts of several lengths.

    The model has random weights. Attention is captured in the last three layers.
    """
    with TemporaryDirectory() as folder:
        path = write_random_model(Path(folder), layers, hidden, 0, max(lengths) + 2 * STEP_LENGTH)
        engine = load(target=path, backend=backend, dtype="float32", method="target").target
        assert engine is not None
        lines = list(time_contexts(engine, lengths, count, rounds, min(3, layers)))
    shape = {"layers": str(layers), "hidden size": str(hidden)}
    about = {**machine(), "backend": choose_backend(backend)[0], **shape}
    if as_json:
        click.echo(json.dumps({"machine": about, "lines": [asdict(line) for line in lines]}))
        return
    click.echo(f"{machine_line(about)}; k = {count}, ms.\n\n{context_table(lines)}", nl=False)


if __name__ == "__main__":
    main()

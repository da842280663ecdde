"""Seconds of a step's verbs behind contexts of different lengths, on one model.

A step costs what its tokens cost, and attention to the context: time may grow with the context in a
straight line, and by attention alone. Knows no backend.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from specguard.bench.replay import plain_words
from specguard.bench.tables import as_table
from specguard.core import GREEDY, Boundary, Capture, LanguageModel, Prompt, Sampling
from specguard.core.errors import UsageError

VERBS = ("propose", "propose k", "extend", "extend captured", "score k", "commit, rewind", "fork")
_NUM_PROMPT_TOKENS = 64
_PIECE = 256  # tokens of an accepted step


@dataclass(frozen=True, slots=True)
class ContextLine:
    """Median seconds of each of `VERBS` behind ``length`` tokens.

    ``capture_ratio`` is the median, over rounds, of reading a step with capture to reading it
    without.
    """

    length: int
    seconds: dict[str, float]
    capture_ratio: float

    @property
    def step_seconds(self) -> float:
        """A step with one candidate: propose, verify with attention, commit."""
        return sum(self.seconds[verb] for verb in ("propose", "extend captured", "commit, rewind"))


def time_contexts(
    model: LanguageModel[Any],
    lengths: Sequence[int],
    num_candidates: int = 4,
    step_length: int = 32,
    num_rounds: int = 5,
    num_layers: int = 3,
) -> Iterator[ContextLine]:
    """A line for each length, shortest first: a prompt and then steps that the model reads.

    Steps are of ``step_length`` tokens; attention is captured in the last ``num_layers`` layers,
    with the first quarter of the context as sinks. Behind `fork` a step is read by the copy, which
    pays for keeping the two apart.

    Raises:
        UsageError: a length that is shorter than the prompt of 64 tokens, or does not leave room
            for a step of every candidate.
    """
    ordered = sorted(set(lengths))
    if ordered[0] < _NUM_PROMPT_TOKENS or ordered[-1] + step_length > model.context_limit:
        raise UsageError(
            f"contexts must lie between {_NUM_PROMPT_TOKENS} and "
            f"{model.context_limit - step_length} tokens"
        )
    rng = np.random.default_rng(0)
    words = plain_words(model)

    def text(count: int) -> tuple[int, ...]:
        return tuple(rng.choice(words, size=count).tolist())

    prompt = Prompt(text(_NUM_PROMPT_TOKENS), (0, _NUM_PROMPT_TOKENS))
    with closing(model.start(prompt)) as sequence:
        for length in ordered:
            while (missing := length - len(sequence.token_ids)) > 0:
                model.extend([sequence], [text(min(missing, _PIECE))])
            steps = [text(step_length) for _ in range(num_candidates)]
            is_source = np.arange(length) >= length // 4
            capture = Capture(is_source, num_layers)
            _, *rounds = [_round(model, sequence, steps, capture) for _ in range(num_rounds + 1)]
            yield ContextLine(
                length,
                {verb: median(found[verb] for found in rounds) for verb in VERBS},
                median(found["extend captured"] / found["extend"] for found in rounds),
            )


def _round(
    model: LanguageModel[Any],
    sequence: Any,
    steps: Sequence[tuple[int, ...]],
    capture: Capture,
) -> dict[str, float]:
    """Each verb once; the sequence stays as it is."""
    length, step, k = len(sequence.token_ids), steps[0], len(steps)
    boundary = Boundary("", frozenset(), len(step))
    found: dict[str, float] = {}

    def timed(verb: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        found[verb] = time.perf_counter() - started
        return result

    def propose(count: int, sampling: Sampling) -> Any:
        draws = np.random.default_rng(length).random((1, count, len(step)), dtype=np.float32)
        return model.propose([sequence], count, sampling, [boundary], draws)

    def read(*captures: Capture) -> None:
        model.extend([sequence], [step], captures or None)

    def keep() -> None:
        model.commit([sequence], [candidate])
        model.rewind(sequence, length)

    def branch() -> None:
        with closing(sequence.fork()) as copy:
            model.extend([copy], [step])

    timed("propose", lambda: propose(1, GREEDY))
    [[candidate, *_]] = timed("propose k", lambda: propose(k, Sampling()))
    timed("commit, rewind", keep)
    timed("extend", read)
    model.rewind(sequence, length)
    timed("extend captured", lambda: read(capture))
    model.rewind(sequence, length)
    timed("score k", lambda: model.score([sequence], [steps]))
    timed("fork", branch)
    return found


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
        cells = [f"{line.seconds[verb] * 1e3:.2f}" for verb in VERBS]
        cells += [f"{line.capture_ratio:.3f}", f"{line.step_seconds * 1e3:.2f}", growth]
        rows.append([str(line.length), *cells])
    columns = ("context", *VERBS, "captured / plain", "step, k = 1", "ms / 1,000 more tokens")
    return as_table(columns, rows)

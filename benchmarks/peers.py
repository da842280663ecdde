"""This project's methods beside other libraries' decoding: ``python -m benchmarks.peers --help``.

Each contender writes a solution to each problem before the next problem begins. Peers that are not
installed are left out and named.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import islice
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.progress import track

from benchmarks.random_pair import random_pair
from benchmarks.replay import Schedule, replaying
from specguard import Solver, UsageError, load
from specguard.bench.tables import as_table, machine, machine_line
from specguard.core.config import USUAL_TOKENS
from specguard.models.pairs import BUILT_IN_PAIR
from specguard.models.tiny import problems

TRANSFORMERS, MLX_LM = "transformers", "mlx-lm"
PEERS = {"cpu": TRANSFORMERS, "cuda": TRANSFORMERS, "mps": TRANSFORMERS, "mlx": MLX_LM}
STEP_LENGTH = 32  # of a replayed step, in the mean


@dataclass(frozen=True, slots=True)
class Written:
    """What a contender wrote, and in how many tokens, a closing EOS included."""

    text: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that writes a solution to a problem.

    ``peer`` is the library that it is compared with. ``is_baseline`` marks that library's plain
    decoding; ``is_lossless`` what must write the same text as plain greedy decoding.
    """

    library: str
    method: str
    peer: str
    write: Callable[[str], Written]
    acceptance: float | None = None
    is_baseline: bool = False
    is_lossless: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A contender's medians over problems: seconds a token with the prompt's reading.

    ``ratio`` is its time a token over that of its peer's plain decoding, ``num_equal`` how many
    texts equal those of the first lossless contender; None where that means nothing.
    """

    library: str
    method: str
    acceptance: float | None
    token_seconds: float
    num_tokens: float
    ratio: float | None
    num_equal: int | None
    num_problems: int


def race(contenders: Sequence[Contender], texts: Sequence[str]) -> list[Line]:
    """Have each contender solve each problem; the first one once before, for nothing."""
    list(_round(contenders, texts[0]))
    console = Console(stderr=True)
    shown = track(texts, "solving", console=console, disable=not console.is_terminal)
    rounds = [list(_round(contenders, text)) for text in shown]
    columns = list(zip(contenders, zip(*rounds, strict=True), strict=True))
    baselines = {entry.peer: column for entry, column in columns if entry.is_baseline}
    expected = next((column for entry, column in columns if entry.is_lossless), ())
    lines = []
    for entry, column in columns:
        ratio = num_equal = None
        if entry.peer in baselines:
            pairs = zip(column, baselines[entry.peer], strict=True)
            ratio = median(own / peers for (own, _), (peers, _) in pairs)
        if entry.is_lossless:
            pairs = zip(column, expected, strict=True)
            num_equal = sum(own.text == first.text for (_, own), (_, first) in pairs)
        lines.append(
            Line(
                library=entry.library,
                method=entry.method,
                acceptance=entry.acceptance,
                token_seconds=median(seconds for seconds, _ in column),
                num_tokens=median(written.num_tokens for _, written in column),
                ratio=ratio,
                num_equal=num_equal,
                num_problems=len(texts),
            )
        )
    return lines


def _round(contenders: Iterable[Contender], text: str) -> Iterator[tuple[float, Written]]:
    """Seconds a token of each contender, and what it wrote."""
    for contender in contenders:
        started = time.perf_counter()
        written = contender.write(text)
        yield (time.perf_counter() - started) / written.num_tokens, written


def missing_peers() -> list[str]:
    """Peers that are not installed here."""
    modules = {TRANSFORMERS: ("torch", "transformers"), MLX_LM: ("mlx", "mlx_lm")}
    return [peer for peer, names in modules.items() if not all(map(find_spec, names))]


def built_in_contenders(backend: str) -> list[Contender]:
    """Greedy decoding by the built-in pair, to the end of the solution."""
    solver = load(BUILT_IN_PAIR, backend=backend, dtype="float32")
    contenders = peer_contenders(solver, backend, USUAL_TOKENS, stops=True)
    for method in "target", "sd", "specguard":
        contenders.append(
            _solving(solver, backend, {"method": method}, is_lossless=method != "specguard")
        )
    return contenders


def replayed_contenders(
    sources: tuple[str, str],
    backend: str,
    num_tokens: int,
    counts: Iterable[int],
    acceptances: Iterable[float],
) -> list[Contender]:
    """Solutions of about ``num_tokens`` with replayed steps and decisions, beside plain decoding.

    With one candidate the target reads it, with several it scores all in one pass.
    """
    draft, target = sources
    solver = load(draft=draft, target=target, backend=backend, dtype="float32")
    num_steps = max(1, round(num_tokens / STEP_LENGTH))
    schedule = Schedule.of(num_steps, STEP_LENGTH, 0.0)
    plain = replaying(solver, schedule)
    contenders = peer_contenders(solver, backend, schedule.num_tokens, stops=False)[:1]
    contenders.append(_solving(plain, backend, {"method": "target"}))
    for share in acceptances:
        shared = Schedule.of(num_steps, STEP_LENGTH, share)
        guessed = replaying(solver, shared, guesses=True)
        contenders.append(_solving(guessed, backend, {"method": "sd"}, share))
        replayed = replaying(solver, shared)
        for count in counts:
            contenders.append(_solving(replayed, backend, {"num_candidates": count}, share))
    return contenders


def _solving(
    solver: Solver,
    backend: str,
    changes: dict[str, Any],
    acceptance: float | None = None,
    is_lossless: bool = False,
) -> Contender:
    def write(problem: str) -> Written:
        solution = solver.solve(problem, **changes)
        return Written(solution.text, solution.stats.num_tokens)

    config = solver.configured(**changes)
    method = str(config.method)
    if method == "specguard":
        method += f", k = {config.num_candidates}"
    library = f"specguard ({backend})"
    return Contender(library, method, peer_of(backend), write, acceptance, is_lossless=is_lossless)


def peer_of(backend: str) -> str:
    """The library that runs what a backend runs.

    Raises:
        UsageError: none does.
    """
    base = backend.partition(":")[0]
    if base not in PEERS:
        raise UsageError(f"no peer runs what backend {backend!r} runs", f"one of {list(PEERS)}")
    return PEERS[base]


Generate = Callable[..., Written]  # of token ids; options say how to speculate


def peer_contenders(solver: Solver, backend: str, limit: int, stops: bool) -> list[Contender]:
    """A library's plain decoding, and its speculation with the same draft.

    ``stops``: at EOS; else exactly ``limit`` tokens are written. None where it is not installed.
    """
    peer = peer_of(backend)
    if peer in missing_peers():
        return []
    assert solver.target is not None
    tokenizer = solver.target.tokenizer
    if peer == TRANSFORMERS:
        generate, speculation = _transformers(solver, backend, limit, stops)
    else:
        generate, speculation = _mlx_lm(solver, limit, stops)

    def contender(method: str, **options: Any) -> Contender:
        def write(problem: str) -> Written:
            prompt = tokenizer.encode_prompt(problem, solver.config.system_prompt, False)
            return generate(list(prompt.token_ids), **options)

        is_baseline = not options
        return Contender(peer, method, peer, write, is_baseline=is_baseline, is_lossless=stops)

    [option] = speculation
    return [contender("generate"), contender(option, **speculation)]


def _transformers(
    solver: Solver, backend: str, limit: int, stops: bool
) -> tuple[Generate, dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    from specguard.backends.pytorch.loading import quiet

    assert solver.draft is not None
    assert solver.target is not None
    tokenizer = solver.target.tokenizer
    with quiet():
        draft, target = (
            AutoModelForCausalLM.from_pretrained(engine.name, dtype=torch.float32)
            .to(backend)
            .eval()
            for engine in (solver.draft, solver.target)
        )
    for model in draft, target:
        model.generation_config.eos_token_id = sorted(tokenizer.eos_ids) if stops else None

    def generate(token_ids: list[int], **options: Any) -> Written:
        inputs = torch.tensor([token_ids], device=target.device)
        with quiet():  # assisted generation warns of what it hands to itself
            output = target.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=limit,
                do_sample=False,
                **options,
            )
        written = output[0, inputs.shape[1] :].tolist()
        return Written(tokenizer.decode(written), len(written))

    return generate, {"assistant_model": draft}


def _mlx_lm(solver: Solver, limit: int, stops: bool) -> tuple[Generate, dict[str, Any]]:
    import mlx.core as mx
    import mlx_lm

    assert solver.draft is not None
    assert solver.target is not None
    draft, _ = mlx_lm.load(solver.draft.name)
    target, tokenizer = mlx_lm.load(solver.target.name)
    for model in draft, target:
        model.set_dtype(mx.float32)
    tokenizer.eos_token_ids = set(solver.target.tokenizer.eos_ids) if stops else set()

    def generate(token_ids: list[int], **options: Any) -> Written:
        parts = list(
            mlx_lm.stream_generate(target, tokenizer, token_ids, max_tokens=limit, **options)
        )
        return Written("".join(part.text for part in parts), parts[-1].generation_tokens)

    return generate, {"draft_model": draft}


def lines_table(lines: Iterable[Line], missing: Iterable[str]) -> str:
    """The contenders; a peer that is missing has a row that says so."""
    columns = (
        "library",
        "method",
        "replayed acceptance",
        "tokens",
        "ms / token",
        "time, peer's generate = 1",
        "equal texts",
    )
    rows = [
        (
            line.library,
            line.method,
            "" if line.acceptance is None else f"{line.acceptance:.0%}",
            f"{line.num_tokens:.0f}",
            f"{line.token_seconds * 1e3:.3f}",
            "" if line.ratio is None else f"{line.ratio:.2f}",
            "" if line.num_equal is None else f"{line.num_equal} of {line.num_problems}",
        )
        for line in lines
    ]
    rows += [(name, "not installed", "", "", "", "", "") for name in missing]
    return as_table(columns, rows)


_POSITIVE = click.IntRange(min=1)


@click.command(context_settings={"show_default": True})
@click.option("--backend", "backends", multiple=True, default=("cpu", "mlx"))
@click.option("--count", type=_POSITIVE, default=10, help="Problems for the built-in pair.")
@click.option(
    "--weights", type=click.Choice(["built-in", "random"]), help="One of the two tables alone."
)
@click.option("--layers", type=_POSITIVE, default=24, help="Of both random models.")
@click.option("--hidden", type=_POSITIVE, default=512, help="Hidden size of the random target.")
@click.option("--draft-hidden", type=_POSITIVE, default=256, help="Of the random draft.")
@click.option("--tokens", type=_POSITIVE, default=192, help="Of a replayed solution, about.")
@click.option("--rounds", type=_POSITIVE, default=3, help="Replayed solutions.")
@click.option("--k", "counts", type=_POSITIVE, multiple=True, default=(1, 4, 16))
@click.option(
    "--acceptance",
    "acceptances",
    type=click.FloatRange(0, 1),
    multiple=True,
    default=(0.5, 0.7, 0.9),
    help="To replay.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of the tables.")
def main(
    backends: tuple[str, ...],
    count: int,
    weights: str | None,
    layers: int,
    hidden: int,
    draft_hidden: int,
    tokens: int,
    rounds: int,
    counts: tuple[int, ...],
    acceptances: tuple[float, ...],
    as_json: bool,
) -> None:
    """Compare decoding with transformers' and mlx-lm's, in single precision.

    First the built-in pair, greedily. Then random weights of a realistic shape, where step lengths
    and decisions are replayed at each acceptance rate of steps (of tokens, for sd); peers write the
    same number of tokens. Times include the reading of the prompt. Options that are plural in
    meaning may be given several times.
    """
    held_out = (problem.text for problem in problems.stream(problems.HELD_OUT))
    texts = list(islice(held_out, max(count, rounds)))
    tables = {}
    if weights != "random":
        contenders = [entry for name in backends for entry in built_in_contenders(name)]
        tables["the built-in pair, greedy"] = race(contenders, texts[:count])
    if weights != "built-in":
        title = f"random weights, {layers} layers, {hidden} wide (draft {draft_hidden}), replayed"
        with random_pair(layers, draft_hidden, hidden) as sources:
            contenders = []
            for name in backends:
                contenders += replayed_contenders(sources, name, tokens, counts, acceptances)
            tables[title] = race(contenders, texts[:rounds])
    about, missing = machine(), missing_peers()
    if as_json:
        data = {name: [asdict(line) for line in lines] for name, lines in tables.items()}
        click.echo(json.dumps({"machine": about, "not_installed": missing, "tables": data}))
        return
    click.echo(f"{machine_line(about)}; medians over problems.")
    for title, lines in tables.items():
        click.echo(f"\n{title}:\n\n{lines_table(lines, missing)}", nl=False)


if __name__ == "__main__":
    main()

"""Our methods on vLLM beside vLLM's own decoding: ``python -m benchmarks.vllm_peer --help``.

Every contender writes solutions to the same problems, so many at a time, before the next ones
begin. vLLM's own engines are in processes of their own and wait while others work. To be run in an
environment with vLLM.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import track

from specguard import Solver, SpecguardError, load, solve_many
from specguard.bench.datasets import Fields, Item, load_dataset
from specguard.bench.grading import Grader
from specguard.bench.statistics import mcnemar, wilson
from specguard.bench.tables import as_table, machine, machine_line
from specguard.core.text import final_answer
from specguard.journal import Journal

OWN = "vLLM"  # its plain decoding, with which all others are compared
_MAX_MODEL_LEN = 4096


@dataclass(frozen=True, slots=True)
class Written:
    """What was written to each problem, and how many tokens that were.

    ``inside`` are the seconds in which vLLM itself worked, None where that was not seen.
    """

    texts: Sequence[str]
    counts: Sequence[int]
    inside: float | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """What a contender made of the problems of one chunk, solved side by side in ``seconds``."""

    contender: str
    chunk: int
    seconds: float
    inside: float | None
    texts: Sequence[str]
    counts: Sequence[int]
    are_right: Sequence[bool]


Write = Callable[[Sequence[str]], Written]  # of problems that are solved side by side


@contextmanager
def vllm_itself(solver: Solver, max_tokens: int, guesses: int, most: int) -> Iterator[Write]:
    """The target in an engine of vLLM's own, in another process, with or without its speculation.

    Raises:
        SpecguardError: it does not start; the last line that it has said.
    """
    assert solver.draft is not None
    assert solver.target is not None
    tokenizer = solver.target.tokenizer
    settings: dict[str, Any] = {
        "model": solver.target.name,
        "dtype": "bfloat16",
        "max_model_len": _MAX_MODEL_LEN,
        "max_num_seqs": most,
        "kv_cache_memory_bytes": 2**30,
        "seed": 0,
    }
    if guesses:
        settings["speculative_config"] = {
            "method": "draft_model",
            "model": solver.draft.name,
            "num_speculative_tokens": guesses,
        }
    stops = {"max_tokens": max_tokens, "stop_token_ids": sorted(tokenizer.eos_ids)}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.vllm_peer", "--worker", json.dumps([settings, stops])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    answers = (line for line in process.stdout if line.startswith(_MARK))

    def ask(request: Any) -> Any:
        assert process.stdin is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return json.loads(next(answers).removeprefix(_MARK))

    def write(problems: Sequence[str]) -> Written:
        prompts = [
            tokenizer.encode_prompt(problem, solver.config.system_prompt, False).token_ids
            for problem in problems
        ]
        found = ask(prompts)
        return Written([tokenizer.decode(each) for each in found], list(map(len, found)))

    try:
        if next(answers, None) is None:
            raise SpecguardError("vLLM's own engine does not start", "its last words are above")
        yield write
    finally:
        process.kill()
        process.wait()


_MARK = "written: "


def serve_requests(settings: dict[str, Any], stops: dict[str, Any]) -> None:
    """Answer lists of prompts on standard input with what vLLM writes to them."""
    from vllm import LLM, SamplingParams

    llm = LLM(**settings)
    params = SamplingParams(temperature=0, detokenize=False, **stops)
    print(_MARK + "ready", flush=True)
    for line in sys.stdin:
        prompts = [{"prompt_token_ids": token_ids} for token_ids in json.loads(line)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        found = [list(output.outputs[0].token_ids) for output in outputs]
        print(_MARK + json.dumps(found), flush=True)


def ours(solver: Solver, method: str) -> Write:
    """One of this project's methods."""
    clock = _Clock(solver)

    def write(problems: Sequence[str]) -> Written:
        clock.seconds = 0.0
        texts, counts = [""] * len(problems), [0] * len(problems)
        for done in solve_many(solver, problems, batch_size=len(problems), method=method):
            if done.solution is None:
                raise done.error or SpecguardError("a problem has no solution")
            texts[done.index] = done.solution.text
            counts[done.index] = done.solution.stats.num_tokens
        return Written(texts, counts, clock.seconds)

    return write


class _Clock:
    """Seconds in which the engines of a pair are inside vLLM."""

    def __init__(self, solver: Solver) -> None:
        self.seconds = 0.0
        for engine in (solver.draft, solver.target):
            llm = engine._handle.llm  # type: ignore[union-attr]
            for name in "step", "add_request", "abort_request":
                setattr(llm, name, self._timed(getattr(llm, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


def race(
    contenders: dict[str, Write], items: Sequence[Item], batch_size: int, journal: Journal
) -> list[Turn]:
    """Have the contenders solve the problems in turns; what the journal has is not done anew."""
    for write in contenders.values():  # a first pass may compile what it needs
        write([items[0].problem])
    known = {(row["contender"], row["chunk"]) for row in journal.rows}
    chunks = [items[place : place + batch_size] for place in range(0, len(items), batch_size)]
    console = Console(stderr=True)
    with Grader() as grader:
        for number, chunk in enumerate(track(chunks, "solving", console=console)):
            turns = list(contenders.items())
            first = number % len(turns)
            for name, write in turns[first:] + turns[:first]:
                if (name, number) in known:
                    continue
                started = time.perf_counter()
                written = write([item.problem for item in chunk])
                seconds = time.perf_counter() - started
                are_right = [
                    grader.grade(final_answer(text), item.answer).is_right
                    for item, text in zip(chunk, written.texts, strict=True)
                ]
                turn = Turn(name, number, seconds, written.inside, written.texts, written.counts,
                            are_right)  # fmt: skip
                journal.append(asdict(turn))
    return [Turn(**row) for row in journal.rows]


def table(turns: Sequence[Turn], names: Sequence[str]) -> str:
    """A line a contender, over the chunks that all have solved."""
    by_name = {name: {t.chunk: t for t in turns if t.contender == name} for name in names}
    chunks = sorted(set.intersection(*(set(found) for found in by_name.values())))
    plain = [by_name[OWN][chunk] for chunk in chunks]
    lines = []
    for name, found in by_name.items():
        own = [found[chunk] for chunk in chunks]
        seconds = sum(turn.seconds for turn in own)
        right, baseline = (list(chain(*(turn.are_right for turn in each))) for each in (own, plain))
        low, high = wilson(sum(right), len(right))
        inside = [turn.inside for turn in own if turn.inside is not None]
        pairs = zip(own, plain, strict=True)
        num_equal = sum(x == y for a, b in pairs for x, y in zip(a.texts, b.texts, strict=True))
        lines.append(
            (
                name,
                f"{len(right)}",
                f"{sum(right) / len(right):.1%}",
                f"{low:.1%} - {high:.1%}",
                "" if name == OWN else f"{mcnemar(right, baseline):.3f}",
                f"{seconds / len(right):.2f}",
                f"{sum(sum(turn.counts) for turn in own) / seconds:.1f}",
                f"{seconds / sum(turn.seconds for turn in plain):.2f}",
                f"{1 - sum(inside) / seconds:.1%}" if inside else "",
                f"{num_equal}",
            )
        )
    heads = (
        "method", "problems", "right", "95% interval", "p", "s / problem", "tokens/s",
        f"time, {OWN} = 1", "outside vLLM", f"texts equal to {OWN}'s",
    )  # fmt: skip
    return as_table(heads, lines)


@click.command(context_settings={"show_default": True})
@click.option("--worker", hidden=True, help="Be one of vLLM's own engines.")
@click.option("--draft", help="Folder of the draft.")
@click.option("--target", help="Folder of the target.")
@click.option("--data", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--problem-field", default="question")
@click.option("--limit", default=20, help="Problems.")
@click.option("--batch-size", default=1, help="Problems at a time.")
@click.option("--max-tokens", default=1024, help="Of a solution.")
@click.option("--guesses", default=4, help="Of vLLM's own speculation; 0: without it.")
@click.option("--methods", default="target,sd,specguard", help="Of this project.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Kept rows.")
def main(
    worker: str | None,
    draft: str | None,
    target: str | None,
    data: Path | None,
    problem_field: str,
    limit: int,
    batch_size: int,
    max_tokens: int,
    guesses: int,
    methods: str,
    output: Path | None,
) -> None:
    """Solve problems by vLLM alone, by its draft-model speculation, and by ours, in turns."""
    if worker is not None:
        serve_requests(*json.loads(worker))
        return
    if draft is None or target is None or data is None or output is None:
        raise click.UsageError("--draft, --target, --data and --output are needed")
    items = load_dataset(file=data, fields=Fields(problem_field, "answer"), limit=limit).items
    arguments = {
        "max_model_len": str(_MAX_MODEL_LEN),
        "max_num_seqs": str(max(batch_size, 8)),
        "kv_cache_memory_bytes": "1G",
    }
    solver = load(
        draft=draft,
        target=target,
        backend="vllm",
        dtype="bfloat16",
        engine_args=arguments,
        max_tokens=max_tokens,
    )
    with ExitStack() as stack:
        most = max(batch_size, 8)
        contenders = {OWN: stack.enter_context(vllm_itself(solver, max_tokens, 0, most))}
        if guesses:
            name = f"{OWN}, draft model, {guesses} guesses"
            own = vllm_itself(solver, max_tokens, guesses, most)
            contenders[name] = stack.enter_context(own)
        for method in methods.split(","):
            contenders[f"specguard, {method}"] = ours(solver, method)
        journal = stack.enter_context(Journal(output / f"batch-{batch_size}.jsonl"))
        turns = race(contenders, items, batch_size, journal)
    click.echo(f"{machine_line(machine())}; draft cost {solver.config.draft_cost}\n")
    click.echo(table(turns, list(contenders)), nl=False)


if __name__ == "__main__":
    main()

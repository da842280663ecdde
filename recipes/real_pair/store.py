"""Keeps collected steps in this folder, without the data set: a collection takes hours.

What was asked comes from the data set again, and the prompts from the tokenizer; the rest is what
the two models wrote. ``python -m recipes.real_pair.store keep`` and ``restore``.
"""

import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from recipes.real_pair.answers import load_problems
from recipes.real_pair.lines import Lines, Record, read_lines
from recipes.real_pair.steps import LABEL_FIELDS, SYSTEM
from specguard.files import write_atomically

STORE = Path(__file__).with_name("steps.jsonl.xz")
SIGNALS = STORE.with_name("signals.jsonl.xz")
FILES = ("solutions", "candidates", "labels", "labels_repeat")
LABEL = ("problem", "step", "kind")
SIGNAL_FILE = "signals.jsonl"
SIGNAL_FIELDS = (*LABEL, "num_prefix", "target", "draft")
_OF_DATA = ("question", "gold", "prompt_token_ids")


def packed_signals(steps: Path) -> bytes:
    """The signals of a collection, compressed, without what its labels say."""
    rows = [{name: row[name] for name in SIGNAL_FIELDS} for row in read_lines(steps / SIGNAL_FILE)]
    return lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


def unpacked_signals(content: bytes, labels: Iterable[Record]) -> Iterator[Record]:
    """The signals as they were; ``labels`` are those of their collection."""
    by_place = {tuple(label[name] for name in LABEL): label for label in labels}
    for line in lzma.decompress(content).splitlines():
        row = json.loads(line)
        label = by_place[tuple(row[name] for name in LABEL)]
        yield {name: label[name] for name in LABEL_FIELDS} | row


def packed(steps: Path) -> bytes:
    """All other files of a collection, compressed, without what the data set says."""
    lines = [
        json.dumps([name, _without_data(name, row)], ensure_ascii=False)
        for name in FILES
        for row in read_lines(steps / f"{name}.jsonl")
    ]
    return lzma.compress("".join(line + "\n" for line in lines).encode())


def unpacked(
    content: bytes, questions: dict[int, tuple[str, str]], prompts: dict[int, list[int]]
) -> Iterator[tuple[str, Record]]:
    """Files and rows as they were; ``questions`` has questions and answers, by problem."""
    for line in lzma.decompress(content).splitlines():
        name, row = json.loads(line)
        problem = row["problem"]
        if name == "solutions":
            question, gold = questions[problem]
            row |= {"question": question, "gold": gold, "prompt_token_ids": prompts[problem]}
        elif name == "candidates":
            row["prefix_token_ids"] = prompts[problem] + row["prefix_token_ids"]
        yield name, row


def problems_of(content: bytes) -> set[int]:
    """The problems that a store holds anything of."""
    rows = map(json.loads, lzma.decompress(content).splitlines())
    return {row["problem"] for _, row in rows}


def _without_data(name: str, row: Record) -> Record:
    row = {field: value for field, value in row.items() if field not in _OF_DATA}
    if name == "candidates":
        row["prefix_token_ids"] = row["prefix_token_ids"][row["prompt_length"] :]
    return row


@click.group()
def main() -> None:
    """Keep a collection in the repository, or restore it to go on."""


@main.command()
@click.option("--output", type=click.Path(exists=True, path_type=Path), required=True)
def keep(output: Path) -> None:
    """Store the collection in the folder OUTPUT."""
    for file, content in (STORE, packed(output)), (SIGNALS, packed_signals(output)):
        write_atomically(file, content)
        click.echo(f"{len(content)} bytes in {file}")


@main.command()
@click.option("--pair", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
def restore(pair: Path, data: Path, output: Path) -> None:
    """Write the stored collection into OUTPUT, which must not hold one."""
    from specguard.backends.tokenizer import FolderTokenizer

    if any((output / f"{name}.jsonl").exists() for name in (*FILES, "signals")):
        raise click.ClickException(f"{output} holds a collection")
    output.mkdir(parents=True, exist_ok=True)
    content = STORE.read_bytes()
    wanted = problems_of(content)
    tokenizer = FolderTokenizer(pair / "coder-1.5b")
    asked = {each.index: each for each in load_problems(data) if each.index in wanted}
    questions = {index: (each.question, each.gold_text) for index, each in asked.items()}
    prompts = {
        index: list(tokenizer.encode_prompt(question, SYSTEM, thinking=False).token_ids)
        for index, (question, _) in questions.items()
    }
    files = {name: Lines(output / f"{name}.jsonl") for name in FILES}
    for name, row in unpacked(content, questions, prompts):
        files[name].append(row)
    if SIGNALS.exists():
        files["signals"] = Lines(output / SIGNAL_FILE)
        for row in unpacked_signals(SIGNALS.read_bytes(), files["labels"].records):
            files["signals"].append(row)
    for name, lines in files.items():
        lines.close()
        click.echo(f"{len(lines.records)} {name}")


if __name__ == "__main__":
    main()

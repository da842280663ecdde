"""Keeps runs of ``specguard bench`` in this folder, without the data set: one takes hours.

``python -m recipes.real_pair.runs keep`` and ``restore``; a restored run goes on with more problems
and methods.
"""

import json
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from recipes.real_pair.lines import Record, read_lines
from specguard.bench.runner import FILE_NAME
from specguard.files import write_atomically

FOLDER = Path(__file__).parent
_MODELS = {"draft": "coder-0.5b", "target": "coder-1.5b"}
_OF_DATA = ("problem", "gold")


def packed(lines: Sequence[Record]) -> bytes:
    """The lines of a run, compressed, without places of models and what the data set says."""
    head, *rows = lines
    rows = [{name: row[name] for name in row if name not in _OF_DATA} for row in rows]
    content = "".join(json.dumps(row) + "\n" for row in [head | _MODELS, *rows])
    return lzma.compress(content.encode())


def unpacked(content: bytes, pair: Path, asked: list[tuple[str, str]]) -> Iterator[str]:
    """The lines again; ``asked`` has questions and answers in the order of the data set."""
    head, *rows = map(json.loads, lzma.decompress(content).splitlines())
    yield json.dumps(head | {role: str(pair / name) for role, name in _MODELS.items()})
    for row in rows:
        question, answer = asked[int(row["id"]) - 1]
        yield json.dumps(row | {"problem": question, "gold": answer})


@click.group()
def main() -> None:
    """Keep a run in the repository, or restore it to go on."""


@main.command()
@click.argument("name")
@click.option("--output", type=click.Path(exists=True, path_type=Path), required=True)
def keep(name: str, output: Path) -> None:
    """Store the run in the folder OUTPUT under NAME, such as gsm8k_test."""
    content = packed(read_lines(output / FILE_NAME))
    write_atomically(FOLDER / f"{name}.jsonl.xz", content)
    click.echo(f"{len(content)} bytes")


@main.command()
@click.argument("name")
@click.option("--pair", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--fields", nargs=2, default=("question", "answer"), show_default=True)
def restore(name: str, pair: Path, data: Path, output: Path, fields: tuple[str, str]) -> None:
    """Write the run NAME into OUTPUT, which must not hold one."""
    if (output / FILE_NAME).exists():
        raise click.ClickException(f"{output} holds a run")
    output.mkdir(parents=True, exist_ok=True)
    asked = [(row[fields[0]], row[fields[1]]) for row in read_lines(data)]
    content = (FOLDER / f"{name}.jsonl.xz").read_bytes()
    lines = [line + "\n" for line in unpacked(content, pair, asked)]
    write_atomically(output / FILE_NAME, "".join(lines).encode())
    click.echo(f"{len(lines) - 1} solutions")


if __name__ == "__main__":
    main()

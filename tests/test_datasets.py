"""Data sets: the usual files load, and a bad line is named."""

import json
from pathlib import Path

import pytest

from specguard.bench.datasets import SOURCES, Fields, load_dataset
from specguard.core import SpecguardError, UsageError
from tests.conftest import benchmark_file

SIZES = {"gsm8k": 1319, "math500": 500, "gaokao2023en": 383, "olympiadbench": 675}


@pytest.mark.parametrize("name", SOURCES)
def test_the_usual_files_load(name: str) -> None:
    found = load_dataset(name, benchmark_file(name))
    assert len(found.items) == SIZES[name]
    assert all(item.problem.strip() and item.answer.strip() for item in found.items)
    # Two answers of Gaokao 2023 are proofs, which nothing can be compared with.
    assert len(found.left_out) == (2 if name == "gaokao2023en" else 0)
    assert load_dataset(name, benchmark_file(name), limit=7).items == found.items[:7]


def write(folder: Path, *lines: object) -> Path:
    file = folder / "data.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("".join(text + "\n" for text in texts))
    return file


FIELDS = Fields("q", "a", "key")
ROW = {"q": "1 + 1?", "a": 2, "key": "x"}


def test_a_file_of_one_s_own_needs_its_fields(tmp_path: Path) -> None:
    file = write(tmp_path, ROW, {**ROW, "a": "\\frac{1}{2}", "key": 7})
    found = load_dataset(file=file, fields=FIELDS)
    assert [(item.id, item.answer) for item in found.items] == [("x", "2"), ("7", "\\frac{1}{2}")]
    assert found.name == "data"
    [first, second] = load_dataset(file=file, fields=Fields("q", "a")).items
    assert (first.id, second.id) == ("1", "2")
    with pytest.raises(UsageError, match="which fields"):
        load_dataset(file=file)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([ROW, '{"q": '], "line 2 of .* is no JSON"),
        ([ROW, "null"], "line 2 of .* no JSON object"),
        ([ROW, "[" * 100_000], "line 2 of .* nested too deeply"),
        ([{**ROW, "q": "\ud800"}], "line 1 of .*no valid Unicode"),
        ([{**ROW, "a": "\ud800"}], "line 1 of .*no valid Unicode"),
        ([ROW, [1]], "line 2 of .* no JSON object"),
        ([{"q": "x", "key": "1"}], "line 1 of .* no field 'a'"),
        ([{**ROW, "q": 3}], "line 1 of .*3 is no text"),
        ([{**ROW, "a": [1]}], "line 1 of .*no text or number"),
        ([{**ROW, "a": True}], "line 1 of .*no text or number"),
        ([ROW, ROW], "line 2 of .* has the id 'x' of line 1"),
        ([{**ROW, "a": " $ "}], "no problem"),
        ([], "no problem"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, lines: list[object], message: str) -> None:
    with pytest.raises(SpecguardError, match=message):
        load_dataset(file=write(tmp_path, *lines), fields=FIELDS)


def test_marks_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    """What editors and other systems leave in a file."""
    row = json.dumps({"q": "1 + 1?", "a": 2}).encode()
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n  \n" + row)
    found = load_dataset(file=file, fields=Fields("q", "a"))
    assert [(item.id, item.answer) for item in found.items] == [("1", "2"), ("2", "2")]
    file.write_bytes(row + b"\n\n{")
    with pytest.raises(SpecguardError, match="line 3 of"):
        load_dataset(file=file, fields=Fields("q", "a"))


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no data set is called 'math5000'"):
        load_dataset("math5000")
    with pytest.raises(SpecguardError, match="cannot be read"):
        load_dataset(file=tmp_path / "none.jsonl", fields=FIELDS)
    (tmp_path / "latin.jsonl").write_bytes(b'{"q": "\xe9"}\n')
    with pytest.raises(SpecguardError, match="not UTF-8"):
        load_dataset(file=tmp_path / "latin.jsonl", fields=FIELDS)


def test_the_built_in_problems_are_the_default() -> None:
    found = load_dataset(limit=3)
    assert found.name == "tiny"
    assert [item.id for item in found.items] == ["0", "1", "2"]
    assert all(item.answer.isdecimal() for item in found.items)

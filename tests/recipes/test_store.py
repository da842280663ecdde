"""A stored collection comes back as it was, and holds nothing of the data set."""

import json
import lzma
from pathlib import Path

from recipes.real_pair.lines import Lines
from recipes.real_pair.steps import LABEL_FIELDS
from recipes.real_pair.store import (
    STORE,
    packed,
    packed_signals,
    problems_of,
    unpacked,
    unpacked_signals,
)

ROWS = {
    "solutions": [
        {
            "problem": 3,
            "question": "How many?",
            "gold": "7",
            "right": True,
            "prompt_token_ids": [1, 2],
            "token_ids": [5],
            "text": "×\u2028",  # noqa: RUF001
        }
    ],
    "candidates": [{"problem": 3, "step": 0, "prompt_length": 2, "prefix_token_ids": [1, 2, 5, 6]}],
    "labels": [{"problem": 3, "step": 0, "right": False, "outcomes": [False, True, False]}],
    "labels_repeat": [],
}


def test_what_was_kept_is_restored(tmp_path: Path) -> None:
    for name, rows in ROWS.items():
        lines = Lines(tmp_path / f"{name}.jsonl")
        for row in rows:
            lines.append(row)
        lines.close()
    content = packed(tmp_path)
    assert b"How many?" not in lzma.decompress(content)
    assert problems_of(content) == {3}
    restored = list(unpacked(content, {3: ("How many?", "7")}, {3: [1, 2]}))
    assert restored == [(name, row) for name, rows in ROWS.items() for row in rows]


def test_signals_are_kept_beside_their_labels(tmp_path: Path) -> None:
    label = {name: f"{name} 1" for name in LABEL_FIELDS}
    other = {**label, "kind": "sample", "right": False}
    signals = {**label, "num_prefix": 7, "target": {"lp": [-0.5]}, "draft": {"lp": [-1.0]}}
    lines = Lines(tmp_path / "signals.jsonl")
    lines.append(signals)
    lines.close()
    content = packed_signals(tmp_path)
    assert b"text 1" not in lzma.decompress(content)
    assert list(unpacked_signals(content, [other, label])) == [signals]


def test_the_store_holds_no_question_and_no_prompt() -> None:
    rows = list(map(json.loads, lzma.decompress(STORE.read_bytes()).splitlines()))
    labels = {(row["problem"], row["step"]) for name, row in rows if name == "labels"}
    places = {(row["problem"], row["step"]) for name, row in rows if name == "candidates"}
    assert labels
    assert labels <= places
    for _, row in rows:
        assert not {"question", "gold", "prompt_token_ids"} & row.keys()

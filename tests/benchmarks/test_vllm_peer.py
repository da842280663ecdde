"""``benchmarks.vllm_peer``: turns are taken, kept and compared; vLLM itself is not needed."""

from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("math_verify")

from benchmarks.vllm_peer import OWN, Turn, Write, Written, race, table
from specguard.bench.datasets import Item
from specguard.journal import Journal

ITEMS = [Item(str(number), f"{number} + 1", str(number + 1)) for number in range(5)]


def writer(called: list[int], wrong: tuple[str, ...] = ()) -> Write:
    """Right answers but for those to some problems; ``called`` counts the problems of each call."""

    def write(problems: Sequence[str]) -> Written:
        called.append(len(problems))
        sums = [int(text.split()[0]) + 1 + (text in wrong) for text in problems]
        return Written([rf"\boxed{{{each}}}" for each in sums], [3] * len(sums), 0.0)

    return write


def test_what_is_kept_is_not_written_again(tmp_path: Path) -> None:
    called: list[int] = []
    contenders = {OWN: writer(called), "ours": writer(called, ("2 + 1",))}
    with Journal(tmp_path / "turns.jsonl") as journal:
        first = race(contenders, ITEMS[:2], 2, journal)
        assert called == [1, 1, 2, 2]
        turns = race(contenders, ITEMS, 2, journal)
    assert called[4:] == [1, 1, 2, 2, 1, 1]
    assert turns[: len(first)] == first
    assert [turn.contender for turn in turns] == [OWN, "ours", "ours", OWN, OWN, "ours"]
    assert [sum(turn.are_right) for turn in turns] == [2, 2, 1, 2, 1, 1]


def test_a_table_compares_what_all_have_solved() -> None:
    def turn(name: str, chunk: int, seconds: float, inside: float | None, right: bool) -> Turn:
        return Turn(name, chunk, seconds, inside, [f"{right}"], [10], [right])

    turns = [turn(OWN, 0, 4.0, None, True), turn(OWN, 1, 4.0, None, True)]
    turns += [turn("ours", 0, 1.0, 0.9, True), turn("ours", 1, 3.0, 2.1, False)]
    turns += [turn(OWN, 2, 9.0, None, True)]  # ours has not come to it
    lines = table(turns, [OWN, "ours"]).splitlines()
    own, ours = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])
    assert own[:3] == [OWN, "2", "100.0%"]
    assert own[5:] == ["4.00", "2.5", "1.00", "", "2"]
    assert ours[:3] == ["ours", "2", "50.0%"]
    assert ours[4:] == ["1.000", "2.00", "5.0", "0.50", "25.0%", "1"]

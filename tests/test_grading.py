"""Grading: equal answers in other words, the four test sets, and answers that never end."""

import multiprocessing
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from specguard.bench.datasets import SOURCES, load_dataset
from specguard.bench.grading import Grader
from specguard.core import SpecguardError
from tests.conftest import benchmark_file


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as shared:
        yield shared


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("0.5", "\\frac{1}{2}"),
        ("\\dfrac{2}{4}", "\\frac12"),
        ("1,319", "1319"),
        ("$18.90", "18.9"),
        ("x = 5", "5"),
        ("[-2, 1)", "\\{x|-2\\leq x < 1\\}"),
        ("\\{x \\mid -2 \\le x < 1\\}", "$\\{x|-2\\leq x < 1\\}$"),
        ("\\left(3, \\frac{\\pi}{2}\\right)", "(3,\\frac{\\pi}{2})"),
        ("(2, \\infty)", "(2,\\infty)"),
        ("\\text{east}", "east"),
        ("\\begin{pmatrix} 1 & 2 \\end{pmatrix}", "\\begin{pmatrix}1&2\\end{pmatrix}"),
        ("1, 2", "2, 1"),
    ],
)
def test_equal_answers_are_right(grader: Grader, answer: str, gold: str) -> None:
    assert grader.grade(answer, gold).reason == "equal"


@pytest.mark.parametrize(
    ("answer", "gold", "reason"),
    [
        ("0.51", "\\frac{1}{2}", "different"),
        ("(2, \\infty)", "[2,\\infty)", "different"),
        ("[-3, 1)", "\\{x|-2\\leq x < 1\\}", "different"),
        ("1, 2", "1, 2, 3", "different"),
        ("west", "east", "different"),
        ("", "7", "no answer"),
        (None, "7", "no answer"),
    ],
)
def test_other_answers_are_wrong(
    grader: Grader, answer: str | None, gold: str, reason: str
) -> None:
    grade = grader.grade(answer, gold)
    assert grade.reason == reason
    assert not grade.is_right


def test_an_answer_that_never_ends_is_given_up() -> None:
    with Grader(seconds=1.0) as grader:
        assert grader.grade("2", "1 + 1").is_right
        started = time.monotonic()
        assert grader.grade("9^{9^{9^{9}}}", "7").reason == "timeout"
        assert time.monotonic() - started < 60
        assert grader.grade("2", "1 + 1").is_right


# Stands in for math-verify in the worker, which takes its path from this process.
DEADLY = """
import os
def parse(text, parsing_timeout):
    if "die" in text:
        os._exit(3)
    if "raise" in text:
        raise ValueError(text)
    return text
def verify(gold, answer, timeout_seconds):
    return gold == answer
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a worker imports as math_verify."""
    pytest.importorskip("math_verify")  # this process has the real one already
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "math_verify.py"


def test_an_answer_that_kills_the_worker_is_a_crash(stand_in: Path) -> None:
    stand_in.write_text(DEADLY)
    with Grader() as grader:
        for answer in "die", "raise":
            assert grader.grade(answer, "7").reason == "crash"
            assert grader.grade("8", "7").reason == "different"


@pytest.mark.parametrize("fault", ["import os; os._exit(1)", "raise MemoryError"])
def test_a_worker_that_dies_at_start_is_said_and_may_be_mended(stand_in: Path, fault: str) -> None:
    stand_in.write_text(fault)
    with Grader() as grader:
        for _ in range(2):
            with pytest.raises(SpecguardError, match="the grading process does not start"):
                grader.grade("8", "7")
        assert grader.grade("7.", "7").is_right  # nothing has to be worked out
        stand_in.write_text(DEADLY)
        assert grader.grade("8", "7").reason == "different"


def test_a_worker_that_is_killed_between_answers_is_replaced() -> None:
    others = set(multiprocessing.active_children())
    with Grader() as grader:
        assert grader.grade("2", "1 + 1").is_right
        [worker] = set(multiprocessing.active_children()) - others
        worker.kill()
        worker.join()
        time.sleep(0.5)  # until that is known
        assert grader.grade("2", "1 + 1").is_right


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_gold_answers_are_right_and_their_neighbours_wrong(grader: Grader, name: str) -> None:
    not_right, not_wrong = [], []
    for item in load_dataset(name, benchmark_file(name)).items:
        # With blanks around every sign the text is another one and the meaning is not.
        spaced = re.sub(r"([=+<>])", r" \1 ", item.answer)
        if not grader.grade(f" {spaced} ", item.answer).is_right:
            not_right.append(item.answer)
        number = re.search(r"\d+", item.answer)
        if number is not None:
            shifted = str(int(number[0]) + 1)
            neighbour = item.answer[: number.start()] + shifted + item.answer[number.end() :]
            if grader.grade(neighbour, item.answer).is_right:
                not_wrong.append(item.answer)
    assert not_right == []
    assert not_wrong == []

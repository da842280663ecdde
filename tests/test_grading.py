"""Grading: equal answers in other words, the four test sets, and answers that never end."""

import re
import time
from collections.abc import Iterator

import pytest

from specguard.bench.datasets import SOURCES, load_dataset
from specguard.bench.grading import Grader
from tests.conftest import benchmark_file


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as found:
        yield found


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
    found = grader.grade(answer, gold)
    assert found.reason == reason
    assert not found.is_right


def test_an_answer_that_never_ends_is_given_up() -> None:
    with Grader(seconds=1.0) as grader:
        assert grader.grade("2", "1 + 1").is_right
        started = time.monotonic()
        assert grader.grade("9^{9^{9^{9}}}", "7").reason == "timeout"
        assert time.monotonic() - started < 60
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

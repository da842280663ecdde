import pytest
from hypothesis import given
from hypothesis import strategies as st

from specguard.core import Boundary, PieceTable, StepScanner, UsageError, final_answer
from specguard.core.text import after_thinking, loop_length
from tests.scripted import EOS, CharTokenizer


def scan(pieces: list[str], delimiter: str = "\n\n", cap: int = 99) -> tuple[int, str | None]:
    """How many tokens are read before the step ends, and how it ends."""
    scanner = StepScanner(lambda index: pieces[index], Boundary(delimiter, frozenset({-1}), cap))
    for index in range(len(pieces)):
        finish = scanner.feed(index)
        if finish is not None:
            return index + 1, finish
    return len(pieces), None


def test_a_delimiter_may_end_inside_a_token_or_span_several() -> None:
    assert scan(["a", ".\n\nThe", "x"]) == (2, "delimiter")
    assert scan(["a", "\n", "\n", "x"]) == (3, "delimiter")
    assert scan(["a.\n", "\nb"]) == (2, "delimiter")
    assert scan(["a", "\n", "b", "\n"]) == (4, None)


def test_blank_text_does_not_end_a_step() -> None:
    assert scan(["\n\n", " ", "\n\n", "a", "\n\n"]) == (5, "delimiter")
    assert scan(["\n\n"] * 4, cap=3) == (3, "length")


def test_eos_wins_and_the_cap_ends_what_nothing_else_does() -> None:
    scanner = StepScanner(lambda _: "a", Boundary("\n\n", frozenset({7}), 5))
    assert scanner.feed(7) == "eos"
    assert scan(["a"] * 9, cap=4) == (4, "length")
    assert scan(["a", "\n\n"], cap=2) == (2, "delimiter")


@given(
    st.lists(st.text("ab\n.", min_size=1, max_size=4), max_size=12),
    st.sampled_from(["\n\n", "\n", ".", "b\na"]),
)
def test_the_scanner_ends_where_the_text_first_holds_the_delimiter(
    pieces: list[str], delimiter: str
) -> None:
    text, expected = "", (len(pieces), None)
    for index, piece in enumerate(pieces):
        text += piece
        if delimiter in text.lstrip():
            expected = (index + 1, "delimiter")
            break
    assert scan(pieces, delimiter) == expected


@given(st.lists(st.text("ab\n", min_size=1, max_size=3), min_size=1, max_size=9), st.integers(0, 9))
def test_a_step_that_is_begun_ends_where_it_would_have_ended(pieces: list[str], cut: int) -> None:
    """A delimiter may have begun in what is written, and text in it counts."""
    length, finish = scan(pieces)
    cut = min(cut, length - 1)
    limits = Boundary("\n\n", frozenset(), 99, tuple(range(cut)))
    scanner = StepScanner(lambda index: pieces[index], limits)
    rest = [scanner.feed(index) for index in range(cut, length)]
    assert rest == [None] * (length - cut - 1) + [finish]


def test_a_boundary_needs_room() -> None:
    with pytest.raises(UsageError):
        Boundary("\n\n", frozenset(), 0)


def test_pieces_keep_their_spaces() -> None:
    table = PieceTable(CharTokenizer())
    assert table(ord(" ")) == " "
    assert table(EOS) == ""


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{21}.", "21"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{1} and then \boxed{2", "1"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{\{ }", r"\{"),
        (r"\boxed{", None),
        ("no box", None),
        (r"\boxed{}", None),
        ("\\boxed{ \n\t}", None),
        (r"put it in \boxed{}. It is \boxed{7}.", "7"),
        (r"It is \boxed{7}, in \boxed{}, in \boxed{ }.", "7"),
        (r"\boxed{7} \boxed{} \boxed{8", "7"),
        (r"\boxed{{}}", "{}"),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


BALANCED = st.recursive(
    st.text("ab ", max_size=3),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: "{" + "".join(parts) + "}"),
)


@given(BALANCED)
def test_balanced_content_comes_back(content: str) -> None:
    assert final_answer("x \\boxed{" + content + "} y") == (content.strip() or None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("It is 7.", "It is 7."),
        ("<think>hm", None),
        ("\n <think>\nhm</think>\n7", "\n7"),
        ("<think></think>", ""),
        ("the tag <think> opens", "the tag <think> opens"),
        ("<think>a</think>b<think>c", "b<think>c"),
    ],
)
def test_what_is_said_follows_the_thinking(text: str, said: str | None) -> None:
    assert after_thinking(text) == said


@pytest.mark.parametrize(
    ("items", "length"),
    [
        ("abab" * 2, 8),
        ("xaaa", 3),
        ("xab" + "ab" * 3 + "a", 9),
        ("abcabcabc", 9),
        ("aabaa", 0),
        ("", 0),
        ("abcdefghabcdefghabcdefgh", 0),  # the period is too long
    ],
)
def test_loops_have_a_length(items: str, length: int) -> None:
    assert loop_length(items, 4, 3) == length


@given(st.text("ab", max_size=12), st.integers(1, 4), st.integers(1, 4))
def test_a_loop_is_where_the_end_repeats_itself(text: str, max_period: int, rounds: int) -> None:
    repeats = (
        text.endswith(text[len(text) - period :] * rounds)
        for period in range(1, max_period + 1)
        if period * rounds <= len(text)
    )
    length = loop_length(text, max_period, rounds)
    assert (length > 0) == any(repeats)
    assert length <= len(text)

"""What is kept of a problem: its first columns hold the tokens that it says they hold."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specguard.backends.local.kept import Branch, KeptSequence, common_length
from specguard.backends.local.layer import Outputs

TOKENS = st.lists(st.integers(0, 2), max_size=5).map(tuple)


@dataclass
class TokenBuffer:
    """Holds a token's id where a real one holds its keys and values."""

    columns: list[int] = field(default_factory=list)

    def write(self, start: int, token_ids: Sequence[int]) -> None:
        assert start <= len(self.columns)
        self.columns[start : start + len(token_ids)] = token_ids

    def copy_columns(self, start: int, columns: Sequence[int]) -> None:
        assert list(columns) == sorted(set(columns))
        assert start < columns[0] or start == columns[0] < columns[-1]
        self.write(start, [self.columns[column] for column in columns])

    def copy_from(self, other: Any, length: int) -> None:
        self.columns = other.columns[:length]


def output_of(token_ids: Sequence[int]) -> Outputs:
    """What is known behind these tokens."""
    return Outputs(tuple(token_ids), "logits")


def read(kept: KeptSequence, prefix: tuple[int, ...]) -> None:
    """Forward what is unread of a prefix."""
    if kept.token_ids != prefix:
        kept.buffer.write(len(kept.token_ids), prefix[len(kept.token_ids) :])  # type: ignore[attr-defined]
        kept.hold(prefix)


def branch_out(
    kept: KeptSequence, steps: list[tuple[int, ...]], is_merged: bool, is_whole: bool
) -> None:
    """Forward steps token by token, side by side; their last tokens only where ``is_whole``."""
    forwarded = [step if is_whole else step[:-1] for step in steps]
    columns: list[list[int]] = [[] for _ in steps]
    known: dict[tuple[int, ...], int] = {}
    for depth in range(max(map(len, forwarded), default=0)):
        for step, own in zip(forwarded, columns, strict=True):
            if depth >= len(step):
                continue
            path = step[: depth + 1]
            if not is_merged or path not in known:
                known[path] = kept.num_columns
                kept.buffer.write(kept.num_columns, [step[depth]])  # type: ignore[attr-defined]
                kept.num_columns += 1
            own.append(known[path])
    kept.branches += [
        Branch(step, own, output_of(kept.token_ids + step) if is_whole else None)
        for step, own in zip(steps, columns, strict=True)
    ]


def check(kept: KeptSequence) -> None:
    buffer = kept.buffer
    assert isinstance(buffer, TokenBuffer)
    assert tuple(buffer.columns[: len(kept.token_ids)]) == kept.token_ids
    assert kept.ahead is None or kept.ahead.hidden == kept.token_ids
    for branch in kept.branches:
        found = [buffer.columns[column] for column in branch.columns]
        assert found == list(branch.token_ids[: len(found)])
        assert all(len(kept.token_ids) <= column < kept.num_columns for column in branch.columns)


@settings(max_examples=300, deadline=None)
@given(
    rounds=st.lists(
        st.tuples(
            st.integers(0, 3),  # which branch is followed
            TOKENS,  # what comes behind it
            st.integers(0, 6),  # how much is cut off
            st.lists(TOKENS.filter(len), min_size=1, max_size=3),  # the next steps
            st.booleans(),
            st.booleans(),
            st.booleans(),
        ),
        max_size=6,
    )
)
def test_the_longest_beginning_is_adopted_and_is_right(rounds: list[Any]) -> None:
    kept = KeptSequence(TokenBuffer())
    for number, behind, num_cut, steps, is_merged, is_whole, wants_more in rounds:
        branch = kept.branches[number].token_ids if number < len(kept.branches) else ()
        prefix = (kept.token_ids + branch + behind)[: -num_cut or None] or (0,)
        paths = [
            kept.token_ids,
            *(kept.token_ids + one.token_ids[: len(one.columns)] for one in kept.branches),
        ]
        longest = max(common_length(path, prefix) for path in paths)
        is_further = wants_more and prefix == kept.token_ids
        before = list(kept.branches), kept.num_columns
        kept.adopt(prefix, keeps_branches=wants_more)
        check(kept)
        assert kept.token_ids == prefix[:longest]
        if is_further:
            assert (kept.branches, kept.num_columns) == before
        else:
            assert not kept.branches
            assert kept.num_columns == longest
        read(kept, prefix)
        check(kept)
        branch_out(kept, steps, is_merged, is_whole)
        check(kept)


@pytest.mark.parametrize(
    ("prefix", "is_known"),
    [((1, 2), True), ((1, 2, 3, 4), True), ((1, 2, 3), False), ((1,), False), ((1, 2, 9), True)],
)
def test_what_is_known_of_the_next_token_is_of_the_last_one(
    prefix: tuple[int, ...], is_known: bool
) -> None:
    kept = KeptSequence(TokenBuffer())
    read(kept, (1, 2))
    kept.ahead = output_of((1, 2))
    branch_out(kept, [(3, 4), (3, 5)], is_merged=True, is_whole=True)
    kept.adopt(prefix)
    check(kept)
    assert (kept.ahead is not None) == is_known
    if is_known:
        kept.drop_last()
        assert kept.ahead is None
        assert kept.token_ids == prefix[: min(len(prefix), 4 if prefix[-1] == 4 else 2)][:-1]


def test_a_step_whose_columns_are_in_place_is_not_copied() -> None:
    class Untouched(TokenBuffer):
        def copy_columns(self, start: int, columns: Sequence[int]) -> None:
            pytest.fail("nothing needs to move")

    kept = KeptSequence(Untouched())
    read(kept, (1, 2))
    branch_out(kept, [(3, 4, 5)], is_merged=False, is_whole=False)
    kept.adopt((1, 2, 3, 4, 5))
    assert kept.token_ids == (1, 2, 3, 4)
    check(kept)


@given(one=TOKENS, other=TOKENS)
def test_common_length_counts_equal_tokens_from_the_beginning(
    one: tuple[int, ...], other: tuple[int, ...]
) -> None:
    length = common_length(one, other)
    assert one[:length] == other[:length]
    assert one[length : length + 1] != other[length : length + 1] or length == len(one) == len(
        other
    )

"""Candidates and continuations as trees: columns and masks against what ancestry says."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specguard.backends.local.tree import CandidateTree, ContinuationTree
from specguard.core.reference import VARIABLE

# For each pass, what each candidate draws; 0 ends it.
DRAWS = st.integers(1, 4).flatmap(
    lambda count: st.lists(
        st.lists(st.integers(0, 3), min_size=count, max_size=count), min_size=1, max_size=5
    )
)


@settings(max_examples=200, deadline=None)
@given(
    passes=DRAWS,
    base=st.integers(1, 4),
    num_earlier=st.integers(0, 3),
    is_merged=st.booleans(),
    is_reference=st.booleans(),
)
def test_a_candidate_sees_the_prefix_and_its_own_tokens(
    passes: list[list[int]], base: int, num_earlier: int, is_merged: bool, is_reference: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(int(is_reference)))
        tree = CandidateTree(base, base + num_earlier, is_merged)
    is_merged = is_merged and not is_reference
    owners: dict[int, Any] = {}  # what each column behind the earlier ones stands for
    paths: dict[int, tuple[int, ...]] = dict.fromkeys(range(len(passes[0])), ())
    alive = [(0, number) for number in paths]
    for drawn in passes:
        going_on = [(leaf, drawn[number], number) for leaf, number in alive if drawn[number] != 0]
        tree.grow(going_on)
        for _, token_id, number in going_on:
            paths[number] = (*paths[number], token_id)
        alive = [
            (place, member) for place, leaf in enumerate(tree.leaves) for member in leaf.members
        ]
        assert sorted(member for _, member in alive) == sorted(member for *_, member in going_on)
        if not alive:
            break
        for place, leaf in enumerate(tree.leaves):
            assert leaf.token_id == paths[leaf.members[0]][-1]
            owners[tree.num_columns + place] = name_of(paths, leaf.members[0], is_merged)
        end = tree.num_columns + len(tree.leaves)
        visible = tree.visible()
        if visible is None:
            visible = np.ones((len(tree.leaves), end - base), dtype=bool)
        assert visible.shape == (len(tree.leaves), end - base)
        for place, leaf in enumerate(tree.leaves):
            for member in leaf.members:
                expected = [
                    column for column, owner in owners.items() if is_above(owner, paths, member)
                ]
                assert [base + place for place in np.flatnonzero(visible[place])] == expected
                assert tree.columns_of(place) == expected
                assert len(expected) == len(paths[member])
        if is_merged:
            assert len(tree.leaves) == len({paths[member] for _, member in alive})
        else:
            assert len(tree.leaves) == len(alive)


def name_of(paths: dict[int, tuple[int, ...]], member: int, is_merged: bool) -> Any:
    """A token by its path, and by its candidate where nothing is shared."""
    return (paths[member], None if is_merged else member)


def is_above(owner: Any, paths: dict[int, tuple[int, ...]], member: int) -> bool:
    path, candidate = owner
    return candidate in (None, member) and paths[member][: len(path)] == path


CONTINUATIONS = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=4
)


@settings(max_examples=200, deadline=None)
@given(
    unread=st.lists(st.integers(10, 12), min_size=1, max_size=4),
    position=st.integers(0, 9),
    continuations=CONTINUATIONS,
    forwards_last=st.booleans(),
    is_reference=st.booleans(),
)
def test_a_continuation_sees_the_prefix_and_its_own_tokens(
    unread: list[int],
    position: int,
    continuations: list[list[int]],
    forwards_last: bool,
    is_reference: bool,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(int(is_reference)))
        tree = ContinuationTree.behind(unread, position, continuations, forwards_last)
    n, total = len(unread), len(tree.token_ids)
    forwarded = [step if forwards_last else step[:-1] for step in continuations]
    expected = np.zeros((total, total), dtype=bool)
    expected[:n, :n] = np.tri(n)
    used = set(range(n))
    for step, path in zip(forwarded, tree.places, strict=True):
        assert path[0] == n - 1
        assert [tree.token_ids[place] for place in path[1:]] == step
        assert [tree.positions[place] for place in path] == [
            position + n - 1 + depth for depth in range(len(path))
        ]
        assert path == sorted(path)
        used.update(path)
        for depth, place in enumerate(path[1:], 2):
            expected[place, :n] = True
            expected[place, path[1:depth]] = True
    assert tree.token_ids[:n] == unread
    assert tree.positions[:n] == list(range(position, position + n))
    assert used == set(range(total))
    visible = np.tri(total, dtype=bool) if tree.visible is None else tree.visible
    np.testing.assert_array_equal(visible, expected)
    if is_reference:
        assert total == n + sum(map(len, forwarded))
    else:  # what several have in common is there once
        beginnings = {tuple(step[: i + 1]) for step in forwarded for i in range(len(step))}
        assert total == n + len(beginnings)

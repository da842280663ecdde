"""Reading and scoring given steps: what is observed, attention included."""

from dataclasses import replace

import numpy as np
import pytest

from specguard.core import GREEDY, Capture
from tests.contract.calls import OTHER_PROMPT, PROMPT, TOLERANCE, Model, observe, propose, same

CONTINUATIONS = [[45, 46, 47], [45], [50, 51, 52, 53], [45, 46, 47]]


def test_reading_says_how_far_it_would_have_written_the_same(model: Model) -> None:
    [own] = propose(model, model.start(PROMPT), 1, 8, GREEDY)
    ids = list(own.token_ids)
    other = [*ids[:3], (ids[3] + 1) % 100 + 1, *ids[4:]]
    for given, expected in ((ids, len(ids)), (other, 3), (other[3:4], 0)):
        [seen] = model.extend([model.start(PROMPT)], [given])
        assert seen.num_greedy == expected
    [scored] = model.score([model.start(PROMPT)], [[ids, other]])
    assert [seen.num_greedy for seen in scored] == [len(ids), 3]


def test_scoring_is_extending_forks(model: Model) -> None:
    sequence, other = model.start(PROMPT), model.start(OTHER_PROMPT)
    model.extend([sequence], [[60, 61]])
    is_source = np.arange(len(sequence.token_ids)) % 3 == 1
    for capture in None, Capture(is_source, 2, 0.0):
        before = list(sequence.token_ids)
        scored = model.score([sequence, other], [CONTINUATIONS, [[70, 71]]], [capture, None])
        assert list(sequence.token_ids) == before
        expected = [model.extend([sequence.fork()], [ids], [capture])[0] for ids in CONTINUATIONS]
        for seen, wanted in zip(scored[0], expected, strict=True):
            same(seen, wanted)
        same(scored[1][0], observe(model, OTHER_PROMPT, [70, 71]))
    with pytest.raises(ValueError, match="at least one"):
        model.score([sequence], [[]])


def test_a_scored_continuation_can_be_committed(model: Model, draft: Model) -> None:
    for index in range(4):
        sequence = model.start(PROMPT)
        candidates = propose(draft, draft.start(PROMPT), 4, 6)
        [scored] = model.score([sequence], [[candidate.token_ids for candidate in candidates]])
        chosen = replace(candidates[index], handle=scored[index].handle)
        model.commit([sequence], [chosen])
        assert tuple(sequence.token_ids) == PROMPT.token_ids + chosen.token_ids
        [after] = model.extend([sequence], [[50, 51, 52]])
        seen = observe(model, PROMPT, [*chosen.token_ids, 50, 51, 52])
        np.testing.assert_allclose(after.token_logprobs, seen.token_logprobs[-3:], atol=TOLERANCE)
        with pytest.raises(ValueError, match="stale"):
            model.commit([sequence], [chosen])


def test_what_was_scored_is_stale_after_another_verb(model: Model) -> None:
    sequence = model.start(PROMPT)
    [candidate] = propose(model, sequence, 1, 5)
    [[first]] = model.score([sequence], [[[45, 46]]])
    with pytest.raises(ValueError, match="stale"):
        model.commit([sequence], [candidate])
    propose(model, sequence, 2, 5)
    with pytest.raises(ValueError, match="stale"):
        model.commit([sequence], [replace(candidate, token_ids=(45, 46), handle=first.handle)])
    # The sequence itself is as it was.
    [seen] = model.extend([sequence], [[50, 51]])
    expected = observe(model, PROMPT, [50, 51])
    np.testing.assert_allclose(seen.token_logprobs, expected.token_logprobs, atol=TOLERANCE)


def test_attention_blocks_keep_all_mass(model: Model) -> None:
    sequence = model.start(PROMPT)
    model.extend([sequence], [[45, 46]])
    context = len(sequence.token_ids)
    for is_source in np.ones(context, dtype=bool), np.arange(context) % 3 == 1:
        fork = sequence.fork()
        [seen] = model.extend([fork], [[50, 51, 52, 53]], [Capture(is_source, 3, 0.01)])
        assert seen.blocks is not None
        assert len(seen.blocks) == 3
        for block in seen.blocks:
            assert block.step.shape == (4, 4)
            np.testing.assert_allclose(block.source_mass + block.step.sum(-1), 1.0, atol=1e-5)
            assert not np.triu(block.step, 1).any()
            assert (block.sink_mass > 0).all() == (not is_source.all())
    [plain] = model.extend([sequence], [[50, 51, 52, 53]])
    assert plain.blocks is None
    with pytest.raises(ValueError, match="source or sink"):
        model.extend([sequence], [[50]], [Capture(np.ones(3, dtype=bool))])


def test_rows_of_a_batch_are_captured_as_each_asks(model: Model) -> None:
    sequences = [model.start(prompt) for prompt in (PROMPT, OTHER_PROMPT, PROMPT)]
    captures = [
        Capture(np.ones(len(PROMPT.token_ids), dtype=bool), 1),
        None,
        Capture(np.ones(len(PROMPT.token_ids), dtype=bool), 3),
    ]
    seen = model.extend(sequences, [[50, 51], [52], [50, 51]], captures)
    assert [None if each.blocks is None else len(each.blocks) for each in seen] == [1, None, 3]
    assert seen[0].blocks is not None
    assert seen[2].blocks is not None
    np.testing.assert_allclose(seen[0].blocks[0].step, seen[2].blocks[2].step, atol=1e-5)


def test_the_hidden_state_is_handed_over_where_asked_for(model: Model) -> None:
    sequence = model.start(PROMPT)
    assert model.extend([sequence], [[45]])[0].last_hidden_state is None
    [seen] = model.extend([sequence], [[46, 47]], hidden_state=True)
    assert seen.last_hidden_state is not None
    assert np.isfinite(seen.last_hidden_state).all()

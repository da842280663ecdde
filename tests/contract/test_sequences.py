"""Sequences: prefixes, reading, committing, rewinding, forks, batches, threads."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from specguard.core import Prompt
from tests.contract.calls import (
    OTHER_PROMPT,
    PROMPT,
    SAMPLING,
    TOLERANCE,
    Model,
    boundary,
    draws,
    observe,
    propose,
)


def test_a_prefix_is_not_read_again_and_stays_as_it_is(model: Model) -> None:
    prefix = model.start(Prompt(PROMPT.token_ids[:3], (0, 0)))
    sequence = model.start(PROMPT, prefix)
    assert tuple(sequence.token_ids) == PROMPT.token_ids
    assert tuple(prefix.token_ids) == PROMPT.token_ids[:3]
    expected = propose(model, model.start(PROMPT), 3, 6)
    for given in sequence, model.start(PROMPT, prefix):
        found = propose(model, given, 3, 6)
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, atol=1e-4)
    whole = model.start(PROMPT)
    assert tuple(model.start(PROMPT, whole).token_ids) == PROMPT.token_ids
    with pytest.raises(ValueError, match="begin"):
        model.start(Prompt(PROMPT.token_ids[1:], (0, 0)), prefix)


def test_committing_is_extending(model: Model) -> None:
    for index in range(4):
        sequence = model.start(PROMPT)
        candidate = propose(model, sequence, 4, 6)[index]
        model.commit([sequence], [candidate])
        assert tuple(sequence.token_ids) == PROMPT.token_ids + candidate.token_ids
        [after] = model.extend([sequence], [[50, 51, 52]])
        seen = observe(model, PROMPT, [*candidate.token_ids, 50, 51, 52])
        np.testing.assert_allclose(after.token_logprobs, seen.token_logprobs[-3:], atol=TOLERANCE)


def test_extending_in_parts_is_extending_at_once(model: Model) -> None:
    tokens = [45, 46, 47, 48, 49, 50]
    whole = observe(model, PROMPT, tokens)
    sequence = model.start(PROMPT)
    parts = [model.extend([sequence], [part])[0] for part in (tokens[:1], tokens[1:4], tokens[4:])]
    np.testing.assert_allclose(
        np.concatenate([part.token_logprobs for part in parts]),
        whole.token_logprobs,
        atol=TOLERANCE,
    )
    longer = Prompt((*PROMPT.token_ids, *tokens[:3]), (1, 5))
    np.testing.assert_allclose(
        observe(model, longer, tokens[3:]).token_logprobs, whole.token_logprobs[3:], atol=TOLERANCE
    )


def test_rewinding_is_exact(model: Model) -> None:
    sequence = model.start(PROMPT)
    model.extend([sequence], [[45, 46, 47]])
    candidate = propose(model, sequence, 3, 5)[2]
    model.commit([sequence], [candidate])
    for length in len(PROMPT.token_ids) + 2, len(PROMPT.token_ids), 3, 1:
        model.rewind(sequence, length)
        assert tuple(sequence.token_ids) == (*PROMPT.token_ids, 45, 46, 47)[:length]
        fork = sequence.fork()
        [seen] = model.extend([fork], [[70, 71]])
        fresh = observe(model, Prompt(tuple(sequence.token_ids), (0, 1)), [70, 71])
        np.testing.assert_allclose(seen.token_logprobs, fresh.token_logprobs, atol=TOLERANCE)
    for length in 0, 2, -1:
        with pytest.raises(ValueError, match="rewind"):
            model.rewind(sequence, length)


def test_forks_are_independent(model: Model) -> None:
    sequence = model.start(PROMPT)
    model.extend([sequence], [[45, 46]])
    fork = sequence.fork()
    model.extend([fork], [[47, 48, 49]])
    model.rewind(sequence, len(PROMPT.token_ids))
    model.extend([sequence], [[80, 81]])
    model.commit([sequence], [propose(model, sequence, 2, 4)[1]])
    [seen] = model.extend([fork], [[60]])
    expected = observe(model, PROMPT, [45, 46, 47, 48, 49, 60]).token_logprobs[-1:]
    np.testing.assert_allclose(seen.token_logprobs, expected, atol=TOLERANCE)
    sequence.close()
    [seen] = model.extend([fork], [[61]])
    assert np.isfinite(seen.token_logprobs).all()


def test_a_batch_gives_what_its_rows_give_alone(model: Model) -> None:
    prompts = [PROMPT, OTHER_PROMPT, Prompt((9,), (0, 1))]
    rows = [draws(3, 7, seed)[0] for seed in range(3)]
    alone = []
    for prompt, row in zip(prompts, rows, strict=True):
        [found] = model.propose([model.start(prompt)], 3, SAMPLING, [boundary(model, 7)], row[None])
        alone.append(found)
    sequences = [model.start(prompt) for prompt in prompts]
    together = model.propose(sequences, 3, SAMPLING, [boundary(model, 7)] * 3, np.stack(rows))
    for one, many in zip(alone, together, strict=True):
        for a, b in zip(one, many, strict=True):
            assert a.token_ids == b.token_ids
            np.testing.assert_allclose(a.token_logprobs, b.token_logprobs, atol=TOLERANCE)
            np.testing.assert_allclose(a.embedding, b.embedding, atol=1e-3)
    model.commit(sequences, [found[1] for found in together])
    continuations = [[50, 51, 52], [53], [54, 55]]
    seen = model.extend(sequences, continuations)
    for prompt, found, tokens, observation in zip(
        prompts, together, continuations, seen, strict=True
    ):
        expected = observe(model, prompt, [*found[1].token_ids, *tokens])
        np.testing.assert_allclose(
            observation.token_logprobs, expected.token_logprobs[-len(tokens) :], atol=TOLERANCE
        )


def test_a_sequence_goes_from_thread_to_thread(model: Model) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def in_a_new_thread(verb: Callable[[], Any]) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(verb).result()

    sequence = in_a_new_thread(lambda: model.start(PROMPT))
    for seed in range(3):
        candidates = in_a_new_thread(lambda seed=seed: propose(model, sequence, 3, 5, seed=seed))
        in_a_new_thread(lambda found=candidates: model.commit([sequence], [found[2]]))
    fork = in_a_new_thread(sequence.fork)
    tokens = tuple(sequence.token_ids[len(PROMPT.token_ids) :])
    [seen] = in_a_new_thread(lambda: model.extend([fork], [[50, 51]]))
    expected = observe(model, PROMPT, [*tokens, 50, 51]).token_logprobs[-2:]
    np.testing.assert_allclose(seen.token_logprobs, expected, atol=TOLERANCE)


def test_stale_candidates_and_closed_sequences_are_refused(model: Model) -> None:
    sequence = model.start(PROMPT)
    candidate = propose(model, sequence, 2, 4)[0]
    model.extend([sequence], [[45]])
    with pytest.raises(ValueError, match="stale"):
        model.commit([sequence], [candidate])
    candidate = propose(model, sequence, 2, 4)[0]
    propose(model, sequence, 2, 4)
    with pytest.raises(ValueError, match="stale"):
        model.commit([sequence], [candidate])
    with pytest.raises(ValueError, match="stale"):
        model.commit([model.start(PROMPT)], [candidate])
    with pytest.raises(ValueError, match="uniforms"):
        model.propose([sequence], 2, SAMPLING, [boundary(model, 4)], draws(2, 3))
    with pytest.raises(ValueError, match="at least one token"):
        model.extend([sequence], [[]])
    candidate = propose(model, sequence, 1, 4)[0]
    sequence.close()
    sequence.close()
    assert sequence.is_closed
    for attempt in (
        lambda: propose(model, sequence, 1, 2),
        lambda: model.extend([sequence], [[45]]),
        lambda: model.rewind(sequence, 1),
        lambda: sequence.fork(),
        lambda: model.commit([sequence], [candidate]),
    ):
        with pytest.raises(ValueError, match="closed"):
            attempt()

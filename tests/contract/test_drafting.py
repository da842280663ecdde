"""Drafting: where a step ends, what is drawn, and who joins."""

import numpy as np
import pytest

from specguard.core import GREEDY, Prompt, Sampling, SpecguardError
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
    propose_within,
)


def test_each_sequence_has_a_boundary_of_its_own(model: Model) -> None:
    prompts = [PROMPT, OTHER_PROMPT, PROMPT]
    [whole] = propose(model, model.start(PROMPT), 1, 12, GREEDY)
    letter = next(
        piece for piece in map(model.tokenizer.decode, [[i] for i in whole.token_ids]) if piece
    )
    cuts = [boundary(model, 5), boundary(model, 9), boundary(model, 12, letter)]
    alone = [
        propose_within(model, model.start(prompt), cut)
        for prompt, cut in zip(prompts, cuts, strict=True)
    ]
    grid = np.zeros((3, 2, 12), dtype=np.float32)
    for row, cut in zip(grid, cuts, strict=True):
        row[:, : cut.max_tokens] = draws(2, cut.max_tokens)[0]
    together = model.propose([model.start(p) for p in prompts], 2, SAMPLING, cuts, grid)
    for one, many in zip(alone, together, strict=True):
        assert [c.token_ids for c in one] == [c.token_ids for c in many]
        assert [c.finish for c in one] == [c.finish for c in many]
    with pytest.raises(ValueError, match="a boundary each"):
        model.propose([model.start(PROMPT)], 2, SAMPLING, cuts, grid)


def test_proposing_leaves_the_sequence_as_it_is(model: Model) -> None:
    sequence = model.start(PROMPT)
    first = propose(model, sequence, 4, 6)
    assert tuple(sequence.token_ids) == PROMPT.token_ids
    again = propose(model, sequence, 4, 6)
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    assert len({c.token_ids for c in first}) > 1


def test_every_candidate_stops_at_its_own_boundary(model: Model) -> None:
    for cap in 1, 3, 8:
        for candidate in propose(model, model.start(PROMPT), 6, cap):
            n = len(candidate.token_ids)
            assert n == cap or candidate.finish in ("eos", "delimiter")
            assert len(candidate.token_logprobs) == len(candidate.token_entropies) == n
            assert (candidate.finish == "eos") == (
                candidate.token_ids[-1] in model.tokenizer.eos_ids
            )
            assert candidate.text == model.tokenizer.decode(candidate.token_ids)
    # A delimiter that is everywhere ends every candidate as soon as it has text.
    sequence = model.start(PROMPT)
    letters = {"e", "a", "o"}
    for letter in letters:
        [found] = model.propose(
            [sequence], 8, Sampling(1.5, 1.0), [boundary(model, 30, letter)], draws(8, 30)
        )
        for candidate in found:
            earlier = model.tokenizer.decode(candidate.token_ids[:-1])
            assert letter not in earlier
            assert (letter in candidate.text) == (candidate.finish == "delimiter")


def test_log_probs_do_not_depend_on_how_a_step_was_sampled(model: Model) -> None:
    for sampling in GREEDY, Sampling(0.3, 0.5), Sampling(2.0, 1.0):
        for candidate in propose(model, model.start(PROMPT), 3, 6, sampling):
            seen = observe(model, PROMPT, candidate.token_ids)
            np.testing.assert_allclose(
                candidate.token_logprobs, seen.token_logprobs, atol=TOLERANCE
            )
            np.testing.assert_allclose(
                candidate.token_entropies, seen.token_entropies, atol=TOLERANCE
            )


def test_a_candidate_does_not_depend_on_how_many_there_are(model: Model) -> None:
    few = propose(model, model.start(PROMPT), 2, 6)
    many = propose(model, model.start(PROMPT), 7, 6)
    assert [c.token_ids for c in few] == [c.token_ids for c in many[:2]]


def test_greedy_takes_the_most_probable_token(model: Model) -> None:
    [candidate] = propose(model, model.start(PROMPT), 1, 5, GREEDY)
    context = list(PROMPT.token_ids)
    for token_id, logprob in zip(candidate.token_ids, candidate.token_logprobs, strict=True):
        for other in range(3, 40):
            [seen] = model.extend([model.start(Prompt(tuple(context), (0, 1)))], [[other]])
            assert seen.token_logprobs[0] <= logprob + TOLERANCE
        context.append(token_id)


def test_tokens_are_the_inverse_cdf_of_the_exact_distribution(model: Model) -> None:
    vocabulary = range(128)
    fork = model.start(PROMPT)
    logs = []
    for token_id in vocabulary:
        length = len(fork.token_ids)
        [seen] = model.extend([fork], [[token_id]])
        logs.append(float(seen.token_logprobs[0]))
        model.rewind(fork, length)
    mass = np.exp(logs)
    grid = (np.arange(400) + 0.5) / 400
    sampling = Sampling(1.0, 1.0)
    [found] = model.propose(
        [model.start(PROMPT)],
        400,
        sampling,
        [boundary(model, 1)],
        grid.astype(np.float32)[None, :, None],
    )
    cdf = np.cumsum(mass)
    for uniform, candidate in zip(grid, found, strict=True):
        [token_id] = candidate.token_ids
        if token_id < len(vocabulary):
            assert (
                cdf[token_id] - mass[token_id] - TOLERANCE <= uniform <= cdf[token_id] + TOLERANCE
            )
        else:
            assert uniform >= cdf[-1] - TOLERANCE


def test_top_p_keeps_the_fewest_tokens_that_reach_it(model: Model) -> None:
    cap, k = 1, 300
    grid = ((np.arange(k) + 0.5) / k).astype(np.float32)[None, :, None]
    sequence = model.start(PROMPT)
    [everything] = model.propose([sequence], k, Sampling(1.0, 1.0), [boundary(model, cap)], grid)
    [nucleus] = model.propose([sequence], k, Sampling(1.0, 0.5), [boundary(model, cap)], grid)
    kept = {c.token_ids: float(np.exp(c.token_logprobs[0])) for c in nucleus}
    assert sum(kept.values()) >= 0.5 - 0.02
    assert sum(kept.values()) - min(kept.values()) < 0.5 + TOLERANCE
    left_out = {c.token_ids: float(np.exp(c.token_logprobs[0])) for c in everything}
    for token_ids, mass in left_out.items():
        assert token_ids in kept or mass <= min(kept.values()) + TOLERANCE


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, 1.0), Sampling(0.3, 0.9)])
@pytest.mark.parametrize("k", [1, 3])
def test_sequences_join_and_leave_while_others_are_drawn_for(
    model: Model, k: int, sampling: Sampling
) -> None:
    rng = np.random.default_rng(k)
    caps = [9, 2, 14, 1, 6, 11, 3]
    prompts = [
        Prompt(tuple(rng.integers(33, 90, n).tolist()), (0, 1)) for n in (7, 3, 1, 12, 5, 2, 9)
    ]
    asked = [
        (prompt, cap, seed) for seed, (prompt, cap) in enumerate(zip(prompts, caps, strict=True))
    ]
    expected = []
    for prompt, cap, seed in asked:
        sequence = model.start(prompt)
        found = propose(model, sequence, k, cap, sampling, seed=seed)
        model.commit([sequence], found[-1:])
        [seen] = model.extend([sequence], [[40, 41]])
        expected.append((found, seen))

    drafting = model.drafting(k, sampling)
    waiting, drawn = list(asked), {}
    numbers: dict[int, int] = {}
    kept = []
    for num_joining, num_wanted in [(2, 1), (1, 1), (0, 1), (3, 2), (1, 9)]:
        for prompt, cap, seed in waiting[:num_joining]:
            sequence = model.start(prompt)
            kept.append(sequence)
            numbers[id(sequence)] = seed
            drafting.add(sequence, boundary(model, cap), draws(k, cap, seed)[0])
        del waiting[:num_joining]
        found = drafting.run(num_wanted)
        assert len(found) >= min(num_wanted, len(kept) - len(drawn))
        for sequence, candidates in found:
            drawn[numbers[id(sequence)]] = candidates
            # What one has drawn can be kept while the others are not done.
            model.commit([sequence], candidates[-1:])
            [seen] = model.extend([sequence], [[40, 41]])
            whole, wanted = expected[numbers[id(sequence)]]
            np.testing.assert_allclose(seen.token_logprobs, wanted.token_logprobs, atol=TOLERANCE)
            assert [c.token_ids for c in candidates] == [c.token_ids for c in whole]
            for one, other in zip(candidates, whole, strict=True):
                assert one.finish == other.finish
                np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, atol=TOLERANCE)
                np.testing.assert_allclose(
                    one.token_entropies, other.token_entropies, atol=TOLERANCE
                )
                np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-3)
    assert sorted(drawn) == list(range(len(asked)))
    assert drafting.run(1) == []


def test_what_cannot_join_is_refused_and_leaves_the_others_as_they_are(model: Model) -> None:
    if type(model).__name__ == "ReferenceModel":
        pytest.skip("it checks when it draws")
    drafting = model.drafting(2, SAMPLING)
    sequence = model.start(PROMPT)
    drafting.add(sequence, boundary(model, 4), draws(2, 4)[0])
    with pytest.raises(ValueError, match="distinct"):
        drafting.add(sequence, boundary(model, 4), draws(2, 4)[0])
    with pytest.raises(ValueError, match="shape"):
        drafting.add(model.start(OTHER_PROMPT), boundary(model, 4), draws(3, 4)[0])
    cap = model.context_limit
    with pytest.raises(SpecguardError, match="context"):
        drafting.add(model.start(OTHER_PROMPT), boundary(model, cap), draws(2, cap)[0])
    closed = model.start(OTHER_PROMPT)
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        drafting.add(closed, boundary(model, 4), draws(2, 4)[0])
    [(found, candidates)] = drafting.run(9)
    assert found is sequence
    expected = propose(model, model.start(PROMPT), 2, 4)
    assert [c.token_ids for c in candidates] == [c.token_ids for c in expected]

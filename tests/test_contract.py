"""What any backend must do: the seam's contract, run over the reference and every backend here."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from specguard.core import (
    GREEDY,
    Boundary,
    Capture,
    Engine,
    LanguageModel,
    Prompt,
    Sampling,
    SolveConfig,
    SpecguardError,
    VerifierConfig,
)
from specguard.core.randomness import Purpose, uniforms

Model = LanguageModel[Any]
SAMPLING = Sampling(0.9, 0.95)
PROMPT = Prompt((5, 40, 41, 60, 61, 62, 7), (1, 5))
OTHER_PROMPT = Prompt((5, 90, 33, 34), (1, 3))
TOLERANCE = 1e-4


def load_reference(request: pytest.FixtureRequest, role: str) -> Model:
    from tests.reference import ReferenceModel

    return ReferenceModel(seed=1 if role == "target" else 2)


def load_torch(request: pytest.FixtureRequest, role: str) -> Model:
    from specguard.backends.pytorch.loading import load_model

    name = "checkpoint" if role == "target" else "draft_checkpoint"
    return load_model(str(request.getfixturevalue(name)))


def load_torch_eager(request: pytest.FixtureRequest, role: str) -> Model:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECGUARD_LEAN", "0")
        return load_torch(request, role)


def load_mlx(request: pytest.FixtureRequest, role: str) -> Model:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    from specguard.backends.mlx.loading import load_model

    name = "checkpoint" if role == "target" else "draft_checkpoint"
    return load_model(str(request.getfixturevalue(name)))


LOADERS: dict[str, Callable[[pytest.FixtureRequest, str], Model]] = {
    "reference": load_reference,
    "torch": load_torch,
    "torch-eager": load_torch_eager,
    "mlx": load_mlx,
}


@pytest.fixture(scope="module", params=LOADERS)
def loader(request: pytest.FixtureRequest) -> Callable[[str], Model]:
    return lambda role: LOADERS[request.param](request, role)


@pytest.fixture(scope="module")
def model(loader: Callable[[str], Model]) -> Model:
    return loader("target")


@pytest.fixture(scope="module")
def draft(loader: Callable[[str], Model]) -> Model:
    return loader("draft")


def boundary(model: Model, cap: int, delimiter: str = "\n\n") -> Boundary:
    return Boundary(delimiter, model.tokenizer.eos_ids, cap)


def draws(k: int, cap: int, seed: int = 0, purpose: Purpose = Purpose.DRAFT) -> Any:
    return uniforms(seed, 0, purpose, 0, k, cap)[np.newaxis]


def propose(
    model: Model, sequence: Any, k: int, cap: int, sampling: Sampling = SAMPLING, **more: Any
) -> Any:
    seed = more.pop("seed", 0)
    [found] = model.propose(
        [sequence], k, sampling, [boundary(model, cap)], draws(k, cap, seed), **more
    )
    return found


def observe(model: Model, prompt: Prompt, token_ids: Any) -> Any:
    sequence = model.start(prompt)
    [seen] = model.extend([sequence], [token_ids])
    sequence.close()
    return seen


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


def propose_within(model: Model, sequence: Any, cut: Boundary) -> Any:
    [found] = model.propose([sequence], 2, SAMPLING, [cut], draws(2, cut.max_tokens))
    return found


def test_reading_says_how_far_it_would_have_written_the_same(model: Model) -> None:
    [own] = propose(model, model.start(PROMPT), 1, 8, GREEDY)
    ids = list(own.token_ids)
    other = [*ids[:3], (ids[3] + 1) % 100 + 1, *ids[4:]]
    for given, expected in ((ids, len(ids)), (other, 3), (other[3:4], 0)):
        [seen] = model.extend([model.start(PROMPT)], [given])
        assert seen.num_greedy == expected
    [scored] = model.score([model.start(PROMPT)], [[ids, other]])
    assert [seen.num_greedy for seen in scored] == [len(ids), 3]


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


def test_a_candidate_does_not_depend_on_how_many_there_are(model: Model) -> None:
    few = propose(model, model.start(PROMPT), 2, 6)
    many = propose(model, model.start(PROMPT), 7, 6)
    assert [c.token_ids for c in few] == [c.token_ids for c in many[:2]]


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


CONTINUATIONS = [[45, 46, 47], [45], [50, 51, 52, 53], [45, 46, 47]]


def same(seen: Any, expected: Any) -> None:
    np.testing.assert_allclose(seen.token_logprobs, expected.token_logprobs, atol=TOLERANCE)
    np.testing.assert_allclose(seen.token_entropies, expected.token_entropies, atol=TOLERANCE)
    assert (seen.blocks is None) == (expected.blocks is None)
    for block, wanted in zip(seen.blocks or (), expected.blocks or (), strict=True):
        np.testing.assert_allclose(block.source_mass, wanted.source_mass, atol=1e-5)
        np.testing.assert_allclose(block.sink_mass, wanted.sink_mass, atol=1e-5)
        np.testing.assert_allclose(block.step, wanted.step, atol=1e-5)


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


def test_a_model_accepts_all_of_its_own_tokens(model: Model) -> None:
    sampling = Sampling(1.0, 0.9)
    own, judge = model.start(PROMPT), model.start(PROMPT)
    [candidate] = propose(model, own, 1, 6, sampling, keep_distributions=True)
    row = uniforms(0, 0, Purpose.ACCEPT, 0, 1, 7) * np.float32(0.99)
    [outcome] = model.accept([judge], [candidate], sampling, row)
    assert outcome.num_accepted == len(candidate.token_ids)
    assert outcome.token_ids[: outcome.num_accepted] == candidate.token_ids
    # A bonus token follows only a candidate that was cut by its cap.
    has_bonus = len(outcome.token_ids) > outcome.num_accepted
    assert has_bonus == (candidate.finish == "length")
    assert tuple(judge.token_ids) == PROMPT.token_ids + outcome.token_ids


def test_greedy_speculation_writes_the_greedy_text(model: Model, draft: Model) -> None:
    [expected] = propose(model, model.start(PROMPT), 1, 12, GREEDY)
    judge, guesser = model.start(PROMPT), draft.start(PROMPT)
    written: list[int] = []
    while len(written) < len(expected.token_ids):
        [guess] = propose(draft, guesser, 1, 3, GREEDY, keep_distributions=True)
        [outcome] = model.accept([judge], [guess], GREEDY, draws(1, 4)[0])
        written += outcome.token_ids
        seen = model.start(PROMPT)
        [observation] = model.extend([seen], [written])
        n = len(outcome.token_ids)
        np.testing.assert_allclose(
            outcome.token_logprobs, observation.token_logprobs[-n:], atol=TOLERANCE
        )
        draft.extend([guesser], [outcome.token_ids])
    assert tuple(written[: len(expected.token_ids)]) == expected.token_ids


def test_speculation_in_a_batch_is_speculation_alone(model: Model, draft: Model) -> None:
    sampling = Sampling(1.2, 0.9)
    prompts = [PROMPT, OTHER_PROMPT]
    rows = np.concatenate([uniforms(s, 0, Purpose.ACCEPT, 0, 1, 5) for s in range(2)])
    guesses = [
        propose(draft, draft.start(prompt), 1, 4, sampling, seed=i, keep_distributions=True)[0]
        for i, prompt in enumerate(prompts)
    ]
    together = model.accept([model.start(prompt) for prompt in prompts], guesses, sampling, rows)
    for i, (prompt, guess) in enumerate(zip(prompts, guesses, strict=True)):
        [alone] = model.accept([model.start(prompt)], [guess], sampling, rows[i : i + 1])
        assert alone.token_ids == together[i].token_ids


def test_candidates_without_distributions_cannot_be_judged(model: Model) -> None:
    candidate = propose(model, model.start(PROMPT), 1, 3)[0]
    with pytest.raises(ValueError, match="keep_distributions"):
        model.accept([model.start(PROMPT)], [candidate], SAMPLING, draws(1, 4)[0])


@pytest.mark.parametrize("verifier", ["draft", "target"])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_target_as_its_own_draft_writes_what_it_writes_alone(
    model: Model, verifier: str, threshold: float
) -> None:
    problem = "Mia has 24 shells."
    settings = {"max_tokens": 60, "max_step_tokens": 9, "max_steps": 12}
    engine = Engine(model, model, SolveConfig(**settings))  # type: ignore[arg-type]
    plain = engine.solve(problem, method="target", detail=True)
    config = VerifierConfig(model=verifier, threshold=threshold)  # type: ignore[arg-type]
    ours = engine.solve(problem, num_candidates=3, sampling=GREEDY, verifier=config, detail=True)
    assert ours.text == plain.text
    assert ours.finish_reason == plain.finish_reason
    expected = "accepted" if threshold == 0.0 else "rewritten"
    assert {step.decision for step in ours.steps} == {expected}
    assert ours.stats.num_tokens == plain.stats.num_tokens


def test_a_seed_decides_the_solution(model: Model) -> None:
    config = SolveConfig(
        num_candidates=4,
        max_tokens=40,
        max_step_tokens=10,
        verifier=VerifierConfig(threshold=0.0),
    )
    engine = Engine(model, model, config)
    texts = [engine.solve("Some problem.", seed=seed).text for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]

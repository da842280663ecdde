"""Sampling steps: which tokens are drawn, what is said of them, and where a step ends."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specguard.core import GREEDY, Boundary, Engine, Sampling, SpecguardError
from tests.contract.calls import (
    FLAT,
    OTHER_PREFIX,
    PREFIX,
    SAMPLING,
    assert_same,
    boundary,
    damaged_copy,
    draws,
    forcing,
    generate_job,
    outcomes,
    run,
    run_together,
    score_job,
)
from tests.reference import ReferenceEngine

# Tokens of the built-in tokenizer; STOP is a full stop with two line breaks.
EOS, BREAK, STOP, SPACE, A, B = 2, 201, 259, 223, 67, 68
SPREAD = Sampling(1.5, 0.6)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLING, FLAT, SPREAD, Sampling(0.3, 0.9)])
def test_candidates_are_those_of_the_reference(
    engine: Engine, plain: ReferenceEngine, sampling: Sampling
) -> None:
    jobs = [
        generate_job(engine, num_candidates=4, cap=9, sampling=sampling),
        generate_job(engine, OTHER_PREFIX, 3, 5, sampling, hidden_states=True, distributions=True),
    ]
    for job in jobs:
        found = run(engine, job)
        assert_same(found, run(plain, job))
        assert (found[0].embedding is not None) == job.hidden_states
        assert (found[0].distributions is not None) == job.distributions
        for candidate in found:
            assert candidate.text == engine.tokenizer.decode(candidate.token_ids)


@pytest.mark.parametrize("least", [0.01, 0.3, 0.9])
def test_a_candidate_ends_with_the_draft_s_confidence(
    engine: Engine, plain: ReferenceEngine, least: float
) -> None:
    settings = {"num_candidates": 4, "cap": 9, "sampling": Sampling(0.5, 0.9)}
    plain_job = generate_job(engine, OTHER_PREFIX, **settings)
    job = replace(plain_job, least_confidence=least)
    found, expected = run(engine, job), run(plain, job)
    if "confidence" not in engine.features:
        expected = run(plain, plain_job)
    else:
        assert min(len(each.token_ids) for each in found) < 9
    assert_same(found, expected)
    # What is kept of them is what a job that goes on from there would compute.
    first = found[0].token_ids
    further = generate_job(engine, OTHER_PREFIX + first, cap=4)
    assert_same(run(engine, further), run(plain, further))


def test_what_is_told_of_candidates_is_how_they_begin(engine: Engine) -> None:
    """An engine need not tell of its tokens; what it has told stands."""
    told: dict[int, tuple[int, ...]] = {}

    def listen(index: int, token_ids: tuple[int, ...]) -> None:
        told[index] = told.get(index, ()) + token_ids

    job = generate_job(engine, num_candidates=4, cap=9, on_tokens=listen)
    candidates = run(engine, job)
    assert told.keys() <= set(range(4))
    for index, token_ids in told.items():
        assert candidates[index].token_ids[: len(token_ids)] == token_ids


def test_a_token_is_the_inverse_cdf_of_its_uniform(engine: Engine, plain: ReferenceEngine) -> None:
    rng = np.random.default_rng(0)
    steps = [rng.integers(3, 964, 5).tolist() for _ in range(6)]
    steps += [[963, 0, 963, 0, 963], [0, 963, 0, 0, 0]]
    uniforms = np.stack([forcing(plain, PREFIX, step, 5) for step in steps])
    cut = Boundary("", frozenset(), 5)
    job = generate_job(engine, PREFIX, 8, 5, FLAT, boundary=cut, uniforms=uniforms)
    assert [candidate.token_ids for candidate in run(engine, job)] == list(map(tuple, steps))


def test_the_smallest_and_the_largest_uniform_draw_what_is_possible(
    engine: Engine, plain: ReferenceEngine
) -> None:
    ends = np.array([[0.0], [1 - 2**-24]], dtype=np.float32)
    for sampling in FLAT, SPREAD, GREEDY:
        job = generate_job(engine, PREFIX, 2, 1, sampling, uniforms=ends)
        possible = np.flatnonzero(plain.distribution(PREFIX, sampling))
        found = [candidate.token_ids[0] for candidate in run(engine, job)]
        assert found == [possible[0], possible[-1]]


@pytest.mark.parametrize(
    ("step", "delimiter", "begun", "cap", "length", "finish"),
    [
        pytest.param([A, BREAK, BREAK, B], "\n\n", (), 6, 3, "delimiter", id="across tokens"),
        pytest.param([A, STOP, B], "\n\n", (), 6, 2, "delimiter", id="end of a token"),
        pytest.param([A, STOP, B], ".", (), 6, 2, "delimiter", id="start of a token"),
        pytest.param([A, STOP, B], ".\n", (), 6, 2, "delimiter", id="inside a token"),
        pytest.param([A, 16, BREAK, B], ".\n\n", (), 4, 4, "length", id="half a delimiter"),
        pytest.param([BREAK, BREAK, A, STOP], "\n\n", (), 6, 4, "delimiter", id="blank first"),
        pytest.param([SPACE, BREAK, BREAK, SPACE, A], "\n\n", (), 5, 5, "length", id="blank alone"),
        pytest.param([BREAK, B], "\n\n", (A, BREAK), 6, 1, "delimiter", id="begun"),
        pytest.param(
            [BREAK, A, BREAK, BREAK], "\n\n", (BREAK,), 6, 4, "delimiter", id="begun blank"
        ),
        pytest.param([A, EOS], "\n\n", (), 6, 2, "eos", id="eos"),
        pytest.param([EOS], "\n\n", (), 6, 1, "eos", id="eos at once"),
        pytest.param([A, B, A], "\n\n", (), 3, 3, "length", id="cap"),
        pytest.param([A, STOP], "\n\n", (), 2, 2, "delimiter", id="delimiter at the cap"),
        pytest.param([A, EOS], "\n\n", (), 2, 2, "eos", id="eos at the cap"),
        pytest.param([A], "\n\n", (), 1, 1, "length", id="cap of one"),
        pytest.param([A, STOP, A, STOP], "", (), 4, 4, "length", id="no delimiter"),
    ],
)
def test_where_a_step_ends(
    engine: Engine,
    plain: ReferenceEngine,
    step: list[int],
    delimiter: str,
    begun: tuple[int, ...],
    cap: int,
    length: int,
    finish: str,
) -> None:
    prefix = PREFIX + begun
    others = [[A, B, A, B, A, B], [B, EOS]]
    uniforms = np.stack([forcing(plain, prefix, one, cap) for one in (step, *others)])
    cut = boundary(engine, cap, delimiter, begun)
    job = generate_job(engine, prefix, 3, cap, FLAT, boundary=cut, uniforms=uniforms)
    found = run(engine, job)
    assert found[0].token_ids == tuple(step[:length])
    assert found[0].finish == finish
    assert found[0].text == engine.tokenizer.decode(step[:length])
    assert found[1].token_ids == tuple(others[0][:cap])  # it is not cut with its neighbour
    assert_same(found, run(plain, job))


def test_a_candidate_does_not_depend_on_how_many_there_are(engine: Engine) -> None:
    many = run(engine, generate_job(engine, num_candidates=7, key="many"))
    for num_candidates in 1, 2, 5:
        job = generate_job(engine, num_candidates=num_candidates, key=num_candidates)
        assert_same(run(engine, job), many[:num_candidates])
    assert len({candidate.token_ids for candidate in many}) > 1


@pytest.mark.parametrize("portions", [(2, 5), (1, 1, 5), (3, 2, 2)])
@pytest.mark.parametrize("cap", [3, 8])
def test_further_candidates_are_those_that_are_drawn_at_once(
    engine: Engine, plain: ReferenceEngine, portions: tuple[int, ...], cap: int
) -> None:
    everything = run(plain, generate_job(engine, num_candidates=7, cap=cap, hidden_states=True))
    for index in 0, 3, 6:  # any of them can be continued
        candidate = everything[index]
        found: list[Any] = []
        for portion in portions:
            found += run(
                engine,
                generate_job(
                    engine,
                    num_candidates=portion,
                    cap=cap,
                    first=len(found),
                    key=index,
                    hidden_states=True,
                ),
            )
        assert_same(found, everything)
        prefix = PREFIX + candidate.token_ids
        following = generate_job(engine, prefix, 3, 4, key=index, hidden_states=True)
        assert_same(run(engine, following), run(plain, following))
        engine.release(index)


def test_further_candidates_need_no_earlier_ones(engine: Engine, plain: ReferenceEngine) -> None:
    job = generate_job(engine, num_candidates=3, first=2, key="further")
    assert_same(run(engine, job), run(plain, job))
    other = generate_job(engine, OTHER_PREFIX, num_candidates=3, first=2, key="further")
    assert_same(run(engine, other), run(plain, other))


def test_jobs_at_the_same_time_give_what_they_give_alone(
    engine: Engine, plain: ReferenceEngine
) -> None:
    jobs = [
        generate_job(engine, PREFIX, 2, 5, key=0),
        generate_job(engine, OTHER_PREFIX, 3, 9, key=1),
        generate_job(engine, (9,), 1, 1, key=2),
        generate_job(engine, (*PREFIX, 70, 71), 2, 7, GREEDY, key=3),
        generate_job(engine, PREFIX, 2, 12, key=4, boundary=boundary(engine, 12, "e")),
        generate_job(engine, OTHER_PREFIX, 2, 6, key=5, hidden_states=True),
        generate_job(engine, OTHER_PREFIX, 2, 6, key=6, distributions=True),
        generate_job(engine, PREFIX, 4, 3, key=7, seed=1),
        score_job([[50, 51], [52]], key=8),
        score_job([[50, 51], [52]], OTHER_PREFIX, key=9, hidden_state=True),
    ]
    for job, found in zip(jobs, run_together(engine, jobs), strict=True):
        assert_same(found, run(plain, job))


def test_jobs_of_one_key_at_the_same_time_do_not_disturb_each_other(
    engine: Engine, plain: ReferenceEngine
) -> None:
    jobs = [
        generate_job(engine, PREFIX, 3, 8),
        generate_job(engine, PREFIX, 2, 5, seed=1),
        generate_job(engine, OTHER_PREFIX, 2, 9, GREEDY),
        score_job([[50, 51], [52]]),
        score_job([[50, 51, 52], [53]], OTHER_PREFIX),
        generate_job(engine, (*PREFIX, 70), 2, 7, first=2),
    ]
    for _ in range(2):
        for job, found in zip(jobs, run_together(engine, jobs), strict=True):
            assert_same(found, run(plain, job))


def test_the_context_window_is_kept(engine: Engine, plain: ReferenceEngine) -> None:
    assert engine.context_limit == 512
    prefix = tuple(np.random.default_rng(0).integers(3, 900, 508).tolist())
    for job in (
        generate_job(engine, prefix, 1, 4, key="long"),
        score_job([[50, 51, 52, 53], [50]], prefix, key="long"),
    ):
        assert_same(run(engine, job), run(plain, job))
    for job in (
        generate_job(engine, prefix, 2, 5, key="long"),
        score_job([[50], [50, 51, 52, 53, 54]], prefix, key="long"),
    ):
        with pytest.raises(SpecguardError, match="513 tokens do not fit the context window of 512"):
            run(engine, job)
    engine.release("long")


def test_a_prefix_may_be_longer_than_what_is_forwarded_at_a_time(
    engine: Engine, plain: ReferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specguard.backends.local.drawing.PREFILL_CHUNK", 4)
    prefix = tuple(range(30, 51))
    for length in 4, 5, 8, 9, 21:
        job = generate_job(engine, prefix[:length], 2, 4, key=("chunks", length))
        assert_same(run(engine, job), run(plain, job))
    seen = score_job([[60, 61], [62]], prefix, key="chunks")
    assert_same(run(engine, seen), run(plain, seen))


def test_a_problem_that_is_over_leaves_no_trace(engine: Engine, plain: ReferenceEngine) -> None:
    engine.release("never heard of")
    job = generate_job(engine, key="over", first=1)
    expected = run(plain, job)
    for _ in range(2):
        assert_same(run(engine, job), expected)
        engine.release("over")


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLING])
def test_numbers_that_are_not_finite_are_the_error_of_their_job(
    loader: Callable[[Path], Engine], checkpoint: Path, tmp_path: Path, sampling: Sampling
) -> None:
    """One token has a damaged embedding: who has it in the prefix cannot be served."""
    engine = loader(damaged_copy(checkpoint, tmp_path / "model"))
    sound = [generate_job(engine, PREFIX, 2, 7, sampling, key=0), score_job([[45, 46]], key=1)]
    damaged = [
        generate_job(engine, (*PREFIX, 300), 2, 4, sampling, key=2),
        score_job([[45, 46]], (*PREFIX, 300), key=3),
    ]
    expected = [run(engine, job) for job in sound]
    for job in damaged:
        with pytest.raises(SpecguardError, match="not finite"):
            run(engine, job)
    together = outcomes(engine, [*damaged, *sound])
    assert all("not finite" in str(outcome) for outcome in together[:2])
    for found, wanted in zip(together[2:], expected, strict=True):
        assert_same(found, wanted)
    # The same problems go on behind another step.
    for key in 2, 3:
        again = generate_job(engine, PREFIX, 2, 7, sampling, key=key)
        assert_same(run(engine, again), expected[0])


def test_uniforms_must_fit_the_job(engine: Engine) -> None:
    with pytest.raises(ValueError, match="uniforms"):
        generate_job(engine, uniforms=draws(2, 5))
    with pytest.raises(ValueError, match="at least one token"):
        generate_job(engine, prefix=())
    with pytest.raises(ValueError, match="at least one candidate"):
        generate_job(engine, num_candidates=0)

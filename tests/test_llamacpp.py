"""The llama.cpp backend apart from llama.cpp: cells, sequences, tokens from logits, parameters.

Contexts are `tests.fake_llama`'s here; the real ones are in `tests/test_llamacpp_real.py`.
"""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specguard.backends.llamacpp import backend as backend_module
from specguard.backends.llamacpp import layer as layer_module
from specguard.backends.llamacpp.backend import LLAMACPP
from specguard.backends.llamacpp.buffers import Path as Columns
from specguard.backends.llamacpp.sampling import Scratch, describe, first_choices, sample, warp
from specguard.core import GREEDY, Sampling, SpecguardError, UsageError
from tests import fake_llama, reference
from tests.contract.calls import (
    FLAT,
    PREFIX,
    assert_same,
    capture,
    damaged_copy,
    generate_job,
    outcomes,
    run,
    run_together,
    score_job,
)
from tests.fake_llama import FakeContext, FakeModel
from tests.reference import ReferenceEngine

STEPS = [[45, 46, 47], [45, 60], [50, 51, 52, 53]]


@pytest.fixture
def engine(checkpoint: Path) -> Any:
    return fake_llama.load(checkpoint)


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> ReferenceEngine:
    return ReferenceEngine.load(checkpoint)


def contexts_of(engine: Any) -> list[FakeContext]:
    model: FakeModel = engine.layer._model
    return model.contexts


def test_cells_are_taken_as_they_are_needed(
    engine: Any, plain: ReferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was known before still is, attention and what others keep included."""
    monkeypatch.setattr(layer_module, "_FIRST_CELLS", 16)
    for key in "first", "second":
        [drawn] = run(engine, generate_job(engine, PREFIX, 1, 6, GREEDY, key=key))
    prefix = PREFIX + drawn.token_ids
    [context] = contexts_of(engine)
    before = context.num_cells
    jobs = [generate_job(engine, prefix, 5, 9, FLAT, key="first")]
    for key in "second", "first":
        jobs.append(score_job(STEPS, prefix, key=key, capture=capture(prefix, "problem")))  # type: ignore[arg-type]
    for job in jobs:
        assert_same(run(engine, job), run(plain, job))
    assert context.num_cells > before >= 16
    assert contexts_of(engine) == [context]


def test_problems_share_contexts_and_leave_them(engine: Any, plain: ReferenceEngine) -> None:
    jobs = [generate_job(engine, (5, 40 + key), 2, 4, FLAT, key=key) for key in range(11)]
    for job, found in zip(jobs, run_together(engine, jobs), strict=True):
        assert_same(found, run(plain, job))
    assert len(contexts_of(engine)) == 2
    for key in range(11):
        engine.release(key)
    gc.collect()
    for key in range(20, 36):  # in what the others have left
        run(engine, generate_job(engine, (5, 40 + key), 2, 4, FLAT, key=key))
        engine.release(key)
    assert len(contexts_of(engine)) == 2
    assert max(len(context.used) for context in contexts_of(engine)) < 40


def test_more_candidates_than_sequences_are_refused(
    engine: Any, plain: ReferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_module, "NUM_SEQUENCES", 20)
    with pytest.raises(SpecguardError, match="no more sequences") as caught:
        run(engine, generate_job(engine, PREFIX, 40, 4, FLAT))
    assert "--k" in caught.value.hint
    job = generate_job(engine, PREFIX, 12, 4, FLAT)
    assert_same(run(engine, job), run(plain, job))


def test_problems_that_together_need_too_many_sequences_get_theirs_one_by_one(
    engine: Any, plain: ReferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_module, "NUM_SEQUENCES", 20)
    jobs = [generate_job(engine, (5, 40 + key), 12, 4, FLAT, key=key) for key in range(3)]
    for job, found in zip(jobs, outcomes(engine, jobs), strict=True):
        assert_same(found, run(plain, job))


def test_a_problem_that_is_no_number_leaves_those_that_wait_in_peace(
    checkpoint: Path, plain: ReferenceEngine, tmp_path: Path
) -> None:
    """Its cells spoil those of all others in the context, which are read again elsewhere."""
    engine = fake_llama.load(damaged_copy(checkpoint, tmp_path / "model"))
    candidates = run(engine, generate_job(engine, PREFIX, 3, 6, FLAT, key="sound"))
    run(engine, score_job(STEPS, (5, 9), key="other"))
    with pytest.raises(SpecguardError, match="not finite"):
        run(engine, score_job([[45]], (*PREFIX, 300), key="damaged"))
    for key, prefix in ("sound", PREFIX + candidates[1].token_ids), ("other", (5, 9, 45, 46)):
        job = score_job(STEPS, prefix, key=key, capture=capture(prefix))
        assert_same(run(engine, job), run(plain, job))
    assert len(contexts_of(engine)) > 1


def test_weights_that_are_not_all_there_are_no_attention(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells that are not where they are thought to be would be another text's attention."""
    original = FakeContext.decode

    def elsewhere(self: FakeContext, *arguments: Any) -> Any:
        decoded = original(self, *arguments)
        decoded.cells[:] = np.roll(decoded.cells, 1) + 1
        return decoded

    monkeypatch.setattr(FakeContext, "decode", elsewhere)
    with pytest.raises(SpecguardError, match="attends to more than the tokens before it"):
        run(engine, score_job(STEPS, capture=capture(PREFIX)))


COLUMNS = st.lists(st.integers(0, 12), max_size=6, unique=True).map(sorted)


@given(lead=st.integers(0, 5), tail=COLUMNS, other_lead=st.integers(0, 5), other_tail=COLUMNS)
def test_paths_are_lists_of_columns(
    lead: int, tail: list[int], other_lead: int, other_tail: list[int]
) -> None:
    first, second = (
        [*range(start), *(column for column in columns if column >= start)]
        for start, columns in ((lead, tail), (other_lead, other_tail))
    )
    path = Columns.of(lead, [column for column in tail if column >= lead])
    other = Columns.of(other_lead, [column for column in other_tail if column >= other_lead])
    assert len(path) == len(first)
    assert (path == other) == (first == second)
    assert path.begins_with(other) == (first[: len(second)] == second)
    for column in range(14):
        assert len(path.before(column)) == sum(each < column for each in first)
        assert path.begins_with(path.before(column))
    longer = path.followed_by([20, 21])
    assert longer == Columns.of(lead, [*(each for each in tail if each >= lead), 20, 21])


LOGITS = st.lists(
    st.floats(-30, 30, width=32) | st.just(-np.inf) | st.sampled_from([1.0, 2.0]),
    min_size=5,
    max_size=5,
)


@given(
    rows=st.lists(LOGITS.filter(lambda row: max(row) > -np.inf), min_size=1, max_size=3),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.1, 0.5, 0.95, 1.0]),
    uniforms=st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=4, max_size=4),
)
def test_tokens_are_those_of_the_plain_way(
    rows: list[list[float]], temperature: float, top_p: float, uniforms: list[float]
) -> None:
    logits = np.array(rows, dtype=np.float32)
    sampling = Sampling(temperature, top_p if temperature else 1.0)
    probs = warp(logits, sampling, Scratch())
    np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-6)
    owners = [place % len(rows) for place in range(4)]
    found = sample(logits, owners, sampling, np.array(uniforms, np.float32), Scratch())
    for token_id, owner, uniform in zip(found, owners, uniforms, strict=True):
        assert probs[owner, token_id] > 0
        below = probs[owner, :token_id].sum()
        assert below - 1e-5 <= uniform <= below + probs[owner, token_id] + 1e-5
    logprobs, entropies = describe(logits, owners, found, Scratch())
    for owner, token_id, logprob, entropy in zip(owners, found, logprobs, entropies, strict=True):
        row = logits[owner].astype(np.float64)
        logs = row - np.logaddexp.reduce(row)
        assert abs(logprob - logs[token_id]) < 1e-5
        expected = -sum(np.exp(log) * log for log in logs if log > -np.inf)
        assert abs(entropy - expected) < 1e-5
    assert first_choices(logits).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("sampling", [Sampling(0.7, 0.8), Sampling(2.0, 0.999), Sampling(1.0, 1.0)])
def test_a_large_vocabulary_is_drawn_from_as_a_small_one(sampling: Sampling) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(3, 50_000)).astype(np.float32)
    for found, row in zip(warp(logits, sampling, Scratch()), logits, strict=True):
        np.testing.assert_allclose(
            found, reference.warp(row.astype(np.float64), sampling), atol=1e-7
        )
    uniforms = rng.random(30).astype(np.float32)
    owners = [place % 3 for place in range(30)]
    drawn = sample(logits, owners, sampling, uniforms, Scratch())
    for token_id, owner, uniform in zip(drawn, owners, uniforms, strict=True):
        cdf = np.cumsum(reference.warp(logits[owner].astype(np.float64), sampling))
        assert cdf[token_id] > uniform - 1e-6
        assert token_id == 0 or cdf[token_id - 1] < uniform + 1e-6


def test_what_is_no_number_is_drawn_all_the_same() -> None:
    """Its log-probability is none either, which whoever asked refuses."""
    logits = np.full((1, 5), np.nan, dtype=np.float32)
    for sampling in GREEDY, Sampling(1.0, 0.5), Sampling(1.0, 1.0):
        [token_id] = sample(logits, [0], sampling, np.array([0.5], np.float32), Scratch())
        assert np.isnan(describe(logits, [0], [token_id], Scratch())[0]).all()


def test_without_the_library_the_backend_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend_module, "find_spec", lambda name: None)
    status = LLAMACPP.status()
    assert not status.is_usable
    assert status.hint == "pip install 'specguard[llamacpp]'"


def test_what_the_backend_cannot_do_is_refused() -> None:
    with pytest.raises(UsageError, match="takes no device number"):
        LLAMACPP.load("model.gguf", "auto", False, "llamacpp:1")
    with pytest.raises(SpecguardError, match="runs no reward model"):
        LLAMACPP.load("model.gguf", "auto", False, None, is_headless=True)

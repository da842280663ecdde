"""Engines that draw by a randomness of their own: what must hold of them all the same.

Their candidates cannot be those of the reference, but everything said of them can. What an engine
does not claim is not asked of it.
"""

import asyncio
import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specguard.core import (
    GREEDY,
    Boundary,
    Engine,
    GenerateJob,
    PieceTable,
    Sampling,
    ScoreJob,
    SolveConfig,
    Solver,
    SpecguardError,
    StepScanner,
    UsageError,
    VerifierConfig,
    solve_many,
)
from tests import fake_vllm
from tests.conftest import make_checkpoint
from tests.contract.calls import (
    FLAT,
    OTHER_PREFIX,
    PREFIX,
    TOLERANCE,
    boundary,
    capture,
    damaged_copy,
    generate_job,
    outcomes,
    run,
    run_together,
    score_job,
)
from tests.contract.calls import assert_same as assert_all_same
from tests.reference import ReferenceEngine
from tests.servers import VLLM_PYTHON, vllm_server

ENGINES = ("fake vllm", "vllm", "vllm server")
CONTINUATIONS = [[45, 46, 47], [45], [50, 51, 52, 53], [45, 46, 47], [45, 46, 60]]
LONG = tuple(30 + place % 60 for place in range(140))
# Where the prefix ends: at the first token, before, at and behind the end of a block.
LENGTHS = (1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 96)
ARGUMENTS = {"enforce_eager": "true", "kv_cache_memory_bytes": "32M", "max_num_seqs": "64"}


@pytest.fixture(scope="module", params=ENGINES)
def loader(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Path], Engine]]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param.startswith("fake"):
            fake_vllm.install(patch)
            yield fake_vllm.load
        elif request.param == "vllm server":
            if VLLM_PYTHON not in os.environ:
                pytest.skip(f"no {VLLM_PYTHON} is named: .ci/engines runs this")
            folder = tmp_path_factory.mktemp("servers")
            with ExitStack() as servers:
                yield lambda checkpoint: serve(servers, checkpoint, folder)
        else:
            if importlib.util.find_spec("vllm") is None:
                pytest.skip("vllm is not installed: .ci/engines runs this")
            from specguard.backends.vllm.backend import VLLM

            backend = VLLM.with_arguments(ARGUMENTS)
            yield lambda folder: backend.load(str(folder), "float32", False, None)


def serve(servers: ExitStack, checkpoint: Path, logs: Path) -> Engine:
    """An engine over vLLM's server of a checkpoint."""
    from specguard.backends.http.backend import HTTP

    log = logs / f"{len(list(logs.iterdir()))}.log"
    url = servers.enter_context(vllm_server(checkpoint, log))
    return HTTP.load(url, "auto", False, None)


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller model with a padded vocabulary, and heads as wide as vLLM wants them."""
    folder = tmp_path_factory.mktemp("padded")
    return make_checkpoint(folder, num_hidden_layers=2, vocab_size=1088, seed=1, head_dim=32)


@pytest.fixture(scope="module")
def draft(request: pytest.FixtureRequest, loader: Callable[[Path], Engine], padded: Path) -> Engine:
    if "server" in request.node.name or "vllm server" in str(request.keywords):
        pytest.skip("a server knows nothing of padding")
    return loader(padded)


def job_of(engine: Engine, *arguments: Any, seed: int = 0, **more: Any) -> GenerateJob:
    return replace(generate_job(engine, *arguments, **more), seed=seed, uniforms=None)


def assert_same(found: list[Any], expected: list[Any]) -> None:
    """As far as the engine says anything; blocks are compared where it captures any."""
    said = [
        replace(
            wanted,
            **{
                name: None
                for name in ("token_entropies", "embedding", "hidden_state", "distributions")
                if hasattr(wanted, name)
            },
        )
        for wanted in expected
    ]
    assert_all_same(found, said)


@pytest.mark.parametrize("cap", [1, 9])
def test_greedy_candidates_are_those_of_the_reference(
    engine: Engine, plain: ReferenceEngine, cap: int
) -> None:
    for prefix in PREFIX, OTHER_PREFIX, (9,), LONG[:70]:
        job = generate_job(engine, prefix, 2, cap, GREEDY)
        found = run(engine, replace(job, uniforms=None))
        assert_same(found, run(plain, job))
        assert found[0].text == engine.tokenizer.decode(found[0].token_ids)


@pytest.mark.parametrize("least", [0.01, 0.3, 0.9])
def test_a_candidate_ends_with_the_draft_s_confidence(
    engine: Engine, plain: ReferenceEngine, least: float
) -> None:
    assert "confidence" in engine.features
    greedy = replace(generate_job(engine, OTHER_PREFIX, 1, 9, GREEDY), least_confidence=least)
    found = run(engine, replace(greedy, uniforms=None))
    assert_same(found, run(plain, greedy))
    sampled = replace(job_of(engine, PREFIX, 6, 9, Sampling(0.5, 0.9)), least_confidence=least)
    for candidate in run(engine, sampled):
        confidence = np.exp(np.cumsum(candidate.token_logprobs.astype(float)))
        assert (confidence[:-1] >= least).all()
        if candidate.finish == "length":
            assert confidence[-1] < least or len(candidate.token_ids) == 9


@pytest.mark.parametrize("sampling", [FLAT, Sampling(0.5, 0.7)])
@pytest.mark.parametrize("delimiter", ["e", "\n\n", "er", ""])
def test_a_step_ends_where_it_must(engine: Engine, sampling: Sampling, delimiter: str) -> None:
    eos_ids = frozenset(range(200, 260))
    for begun in (), PREFIX[-2:]:
        cut = Boundary(delimiter, eos_ids, 12, begun)
        found = run(engine, job_of(engine, PREFIX, 24, 12, sampling, boundary=cut))
        for candidate in found:
            scanner = StepScanner(PieceTable(engine.tokenizer), cut)
            told = [scanner.feed(token_id) for token_id in candidate.token_ids]
            assert told == [None] * (len(told) - 1) + [candidate.finish]
            assert candidate.text == engine.tokenizer.decode(candidate.token_ids)
        if sampling == FLAT:
            finishes = {candidate.finish for candidate in found}
            assert finishes == {"eos", "delimiter" if delimiter in ("e", "er") else "length"} | (
                {"length"} if any(len(each.token_ids) == 12 for each in found) else set()
            )


@pytest.mark.parametrize("sampling", [FLAT, Sampling(0.7, 0.8)])
def test_log_probs_are_raw(engine: Engine, plain: ReferenceEngine, sampling: Sampling) -> None:
    candidates = run(engine, job_of(engine, PREFIX, 5, 8, sampling))
    steps = [candidate.token_ids for candidate in candidates]
    for observer in plain, engine:
        seen = run(observer, score_job(steps))
        for candidate, observation in zip(candidates, seen, strict=True):
            np.testing.assert_allclose(
                candidate.token_logprobs, observation.token_logprobs, atol=TOLERANCE
            )


@pytest.mark.parametrize("sampling", [Sampling(1.5, 0.6), Sampling(1.0, 1.0)])
def test_tokens_are_drawn_from_the_warped_distribution(
    engine: Engine, plain: ReferenceEngine, sampling: Sampling
) -> None:
    num_drawn = 500
    candidates = run(engine, job_of(engine, PREFIX, num_drawn, 1, sampling, seed=3))
    drawn = np.array([candidate.token_ids[0] for candidate in candidates])
    probs = plain.distribution(PREFIX, sampling)
    assert (probs[drawn] > 0).all()
    top = probs.argsort()[-3:]
    for token_id in top:
        spread = np.sqrt(probs[token_id] * (1 - probs[token_id]) / num_drawn)
        assert abs((drawn == token_id).mean() - probs[token_id]) < 5 * spread


def test_a_seed_decides_and_candidates_differ(engine: Engine) -> None:
    first, again, other = (
        [each.token_ids for each in run(engine, job_of(engine, PREFIX, 4, 8, FLAT, seed=seed))]
        for seed in (2**63 - 2, 2**63 - 2, 70)
    )
    assert first == again
    assert len({*first, *other}) == 8


def test_who_listens_hears_every_token_before_the_job_is_done(engine: Engine) -> None:
    heard: dict[int, list[int]] = {}
    turns: list[Any] = []

    def listen(candidate: int, token_ids: tuple[int, ...]) -> None:
        heard.setdefault(candidate, []).extend(token_ids)
        turns.append(asyncio.get_running_loop())

    found = run(engine, replace(job_of(engine, PREFIX, 3, 9, FLAT), on_tokens=listen))
    assert [tuple(heard[index]) for index in range(3)] == [each.token_ids for each in found]
    assert len(turns) > 3  # as they come


def test_what_a_listener_raises_is_the_outcome(engine: Engine) -> None:
    def listen(candidate: int, token_ids: tuple[int, ...]) -> None:
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        run(engine, replace(job_of(engine, PREFIX, 3, 9, FLAT), on_tokens=listen))
    assert len(run(engine, job_of(engine))) == 2


@pytest.mark.parametrize("continuations", [CONTINUATIONS, CONTINUATIONS[:1], CONTINUATIONS[1:2]])
def test_observations_are_those_of_the_reference(
    engine: Engine, plain: ReferenceEngine, continuations: list[list[int]]
) -> None:
    for choices in False, True:
        job = score_job(continuations, choices=choices)
        assert_same(run(engine, job), run(plain, job))


@pytest.fixture(params=[True, False], ids=["limited", "unlimited"])
def found_in_cache(
    request: pytest.FixtureRequest, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> Engine:
    """Either the search in the cache is bounded, or what it has found too much is asked again."""
    if not request.param:
        if not hasattr(engine, "_limit"):
            pytest.skip("a server's cache is its own affair")
        monkeypatch.setattr(engine, "_limit", None)
    return engine


@pytest.mark.parametrize("length", LENGTHS)
def test_a_step_that_lies_in_the_cache_is_scored_as_any_other(
    found_in_cache: Engine, plain: ReferenceEngine, length: int
) -> None:
    """Drawn here, scored here, scored again, and once more as a part of what was written."""
    engine = found_in_cache
    prefix = LONG[:length]
    [own] = run(engine, job_of(engine, prefix, 1, 40, GREEDY, boundary=boundary(engine, 40, "")))
    whole = own.token_ids
    for step in whole, whole[:1], whole[:9], whole:
        job = score_job([step], prefix)
        found = run(engine, job)
        assert_same(found, run(plain, job))
        assert found[0].num_leading_choices == len(step)
    other = (*whole[:20], (whole[20] + 1) % 100 + 1, *whole[21:])
    job = score_job([other, whole], prefix)
    found = run(engine, job)
    assert_same(found, run(plain, job))
    assert [seen.num_leading_choices for seen in found] == [20, len(whole)]


@pytest.mark.parametrize("loader", ["vllm"], indirect=True)
@pytest.mark.parametrize("sources", ["context", "problem"])
@pytest.mark.parametrize("length", LENGTHS)
def test_blocks_are_those_of_the_reference(
    found_in_cache: Engine, plain: ReferenceEngine, sources: str, length: int
) -> None:
    engine = found_in_cache
    prefix = LONG[:length]
    [drawn] = run(engine, job_of(engine, prefix, 1, 30, GREEDY))
    steps = [[50, 51, 52], [50], [*range(100, 140)], [50, 51, 52], list(drawn.token_ids)]
    # No weight lies so near these that a rounding decides whether it is dropped.
    for layers, epsilon in (3, 0.0123), (1, 0.0), (4, 0.2):
        job = score_job(steps, prefix, capture=capture(prefix, sources, layers, epsilon))
        assert_same(run(engine, job), run(plain, job))
    # What was drawn or scored is a part of the prefix now.
    longer = (*prefix, *steps[2])
    job = score_job(steps, longer, capture=capture(longer, sources, 3, 0.0123))
    assert_same(run(engine, job), run(plain, job))


def test_capture_that_cannot_be_done_is_refused(engine: Engine) -> None:
    if "attention" in engine.features:
        with pytest.raises(UsageError, match="attention of 5 layers is asked for"):
            run(engine, score_job([[50]], capture=capture(PREFIX, num_layers=5)))
    else:
        with pytest.raises(SpecguardError, match=r"cannot be captured: (this is no|a server)"):
            run(engine, score_job([[50]], capture=capture(PREFIX)))


def test_what_is_not_claimed_is_refused_with_a_reason(engine: Engine) -> None:
    assert engine.features - {"attention"} == {"scoring", "choices", "confidence"}
    for feature in ("hidden states", "entropy", "distributions", "exact randomness"):
        assert engine.reasons[feature]  # type: ignore[index]
    for job in (
        job_of(engine, hidden_states=True),
        job_of(engine, distributions=True),
        score_job([[50]], hidden_state=True),
        score_job([[50]], distributions=GREEDY),
    ):
        with pytest.raises(UsageError, match="neither hidden states nor"):
            run(engine, job)
    with pytest.raises(UsageError, match="temperatures from"):
        run(engine, job_of(engine, sampling=Sampling(0.002, 1.0)))


def test_what_does_not_fit_the_context_is_refused(engine: Engine) -> None:
    assert engine.context_limit == 511
    prefix = tuple(30 + place % 60 for place in range(508))
    for job in job_of(engine, prefix, 1, 4), score_job([[50] * 4], prefix):
        with pytest.raises(SpecguardError, match="512 tokens do not fit"):
            run(engine, job)
    assert len(run(engine, job_of(engine, prefix, 1, 3, boundary=boundary(engine, 3)))) == 1
    assert len(run(engine, score_job([[50] * 3], prefix))[0].token_logprobs) == 3


def test_jobs_at_the_same_time_give_what_they_give_alone(
    engine: Engine, plain: ReferenceEngine
) -> None:
    jobs: list[GenerateJob | ScoreJob] = [
        generate_job(engine, PREFIX, 2, 5, GREEDY, key=0),
        score_job([[50, 51], [50, 60]], LONG[:40], key=1),
        generate_job(engine, OTHER_PREFIX, 1, 9, GREEDY, key=2),
        score_job(CONTINUATIONS, key=3),
    ]
    for _ in range(2):
        for job, found in zip(jobs, run_together(engine, jobs), strict=True):
            assert_same(found, run(plain, job))


def test_a_cancelled_job_ends_and_others_go_on(engine: Engine, plain: ReferenceEngine) -> None:
    async def work() -> Any:
        endless = job_of(engine, PREFIX, 4, 400, FLAT, boundary=Boundary("", frozenset(), 400))
        task = asyncio.create_task(engine.generate(endless))
        other = asyncio.create_task(engine.generate(generate_job(engine, PREFIX, 1, 9, GREEDY)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await other

    found = asyncio.run(work())
    assert_same(found, run(plain, generate_job(engine, PREFIX, 1, 9, GREEDY)))
    handle: Any = getattr(engine, "_handle", None)
    if handle is None:
        return
    handle._driver.call(lambda: None)
    assert not handle.is_busy


def test_numbers_that_are_not_finite_are_the_error_of_their_job(
    loader: Callable[[Path], Engine], checkpoint: Path, tmp_path: Path
) -> None:
    engine = loader(damaged_copy(checkpoint, tmp_path / "model"))
    sound = [job_of(engine, PREFIX, 2, 7, GREEDY, key=0), score_job([[45, 46]], key=1)]
    damaged = [
        job_of(engine, (*PREFIX, 300), 2, 4, GREEDY, key=2),
        score_job([[45, 46]], (*PREFIX, 300), key=3),
    ]
    expected = [run(engine, job) for job in sound]
    together = outcomes(engine, [*damaged, *sound])
    # A server makes no JSON of them.
    for outcome in together[:2]:
        assert isinstance(outcome, SpecguardError), together
        assert "not finite" in str(outcome) or "Out of range" in str(outcome)
    for found, wanted in zip(together[2:], expected, strict=True):
        assert_same(found, wanted)


def test_a_padded_vocabulary_ends_with_the_tokenizer_s(draft: Engine, padded: Path) -> None:
    plain = ReferenceEngine.load(padded)
    assert len(plain.model.weights["lm_head.weight"]) == 1088
    job = score_job([[963, 45]])
    assert_same(run(draft, job), run(plain, job))
    found = run(draft, job_of(draft, PREFIX, 30, 8, FLAT))
    assert max(token_id for each in found for token_id in each.token_ids) < 964


def test_an_id_that_the_model_does_not_have_is_refused(engine: Engine) -> None:
    for job in job_of(engine, (5, 5000)), score_job([[5, 964]]):
        with pytest.raises(SpecguardError, match="has no token"):
            run(engine, job)
    assert len(run(engine, job_of(engine))) == 2


@pytest.mark.parametrize("verifier", ["draft", "target"])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_target_as_its_own_draft_writes_what_it_writes_alone(
    engine: Engine, verifier: Any, threshold: float
) -> None:
    weights = {"log_prob": 1.0}
    config = SolveConfig(max_tokens=40, max_step_tokens=9, max_steps=8, selector="ngram")
    solver = Solver(engine, engine, config)
    judged = VerifierConfig(model=verifier, threshold=threshold, weights=weights)
    plain = solver.solve("Mia has 24 shells.", method="target", verifier=judged)
    ours = solver.solve("Mia has 24 shells.", num_candidates=2, sampling=GREEDY, verifier=judged)
    assert ours.text == plain.text
    assert {step.decision for step in ours.steps} == {"accepted" if threshold == 0 else "rewritten"}


def test_problems_side_by_side_and_in_threads_give_what_they_give_alone(
    engine: Engine, draft: Engine
) -> None:
    judged = VerifierConfig(
        model="target", weights={"log_prob": 1.0}, bounds={"log_prob": (-14.0, -5.0)}, threshold=0.5
    )
    config = SolveConfig(
        max_tokens=30, max_step_tokens=9, max_steps=6, selector="ngram", delimiter="i",
        num_candidates=1, sampling=GREEDY, verifier=judged,
    )  # fmt: skip
    solver = Solver(draft, engine, config)
    texts = ["Mia has 24 shells.", "Some problem.", "Tom has 3 pens and buys 4."]
    expected = [solver.solve(text).text for text in texts]
    found = {each.index: each.solution for each in solve_many(solver, texts, batch_size=3)}
    assert [found[index].text for index in range(3)] == expected  # type: ignore[union-attr]
    with ThreadPoolExecutor(3) as pool:
        assert [each.text for each in pool.map(solver.solve, texts)] == expected

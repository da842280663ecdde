"""Scoring given steps: what is observed of them, attention included."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specguard.core import GREEDY, Engine, Sampling, ScoreJob, SpecguardError
from tests.contract.calls import (
    OTHER_PREFIX,
    PREFIX,
    SAMPLING,
    assert_same,
    capture,
    generate_job,
    run,
    run_together,
    score_job,
)
from tests.reference import ReferenceEngine

CONTINUATIONS = [[45, 46, 47], [45], [50, 51, 52, 53], [45, 46, 47], [45, 46, 60]]
LONGER = (*PREFIX, 70, 71, 72)


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"hidden_state": True},
        {"distributions": SAMPLING},
        {"choices": True},
        {"distributions": GREEDY, "hidden_state": True},
        {"capture": capture(PREFIX)},
        {"capture": capture(PREFIX, "problem", 2, 0.0), "distributions": Sampling(2.0, 1.0)},
        {"capture": capture(PREFIX, "problem", 4, 0.2)},
    ],
    ids=lambda wanted: ", ".join(wanted),
)
@pytest.mark.parametrize("continuations", [CONTINUATIONS, CONTINUATIONS[:1], CONTINUATIONS[1:2]])
def test_observations_are_those_of_the_reference(
    engine: Engine, plain: ReferenceEngine, continuations: list[list[int]], wanted: dict[str, Any]
) -> None:
    job = score_job(continuations, key="observed", **wanted)
    found = run(engine, job)
    assert_same(found, run(plain, job))
    for seen, token_ids in zip(found, continuations, strict=True):
        n = len(token_ids)
        assert len(seen.token_logprobs) == len(seen.token_entropies) == n
        assert (seen.hidden_state is None) != ("hidden_state" in wanted)
        assert (seen.blocks is None) != ("capture" in wanted)
        if "distributions" in wanted:
            assert len(seen.distributions) == n + 1
            np.testing.assert_allclose(seen.distributions.sum(-1), 1, atol=1e-5)
    engine.release("observed")


def test_several_continuations_are_seen_as_each_alone(engine: Engine) -> None:
    is_captured = {"capture": capture(PREFIX, "problem"), "hidden_state": True}
    together = run(engine, score_job(CONTINUATIONS, **is_captured))
    for seen, token_ids in zip(together, CONTINUATIONS, strict=True):
        assert_same([seen], run(engine, score_job([token_ids], key="alone", **is_captured)))


def test_first_choices_say_how_far_the_model_would_have_written_the_same(engine: Engine) -> None:
    [own] = run(engine, generate_job(engine, PREFIX, 1, 8, GREEDY, key="own"))
    ids = list(own.token_ids)
    other = [*ids[:3], (ids[3] + 1) % 100 + 1, *ids[4:]]
    found = run(engine, score_job([ids, other, other[3:]], key="own"))
    assert [seen.num_leading_choices for seen in found] == [len(ids), 3, 0]
    assert found[0].is_first_choice.all()


def test_log_probs_do_not_depend_on_how_a_step_was_sampled(engine: Engine) -> None:
    for sampling in GREEDY, Sampling(0.3, 0.5), Sampling(2.0, 1.0):
        candidates = run(engine, generate_job(engine, PREFIX, 3, 6, sampling, key="sampled"))
        steps = [candidate.token_ids for candidate in candidates]
        for candidate, seen in zip(
            candidates, run(engine, score_job(steps, key="sampled")), strict=True
        ):
            np.testing.assert_allclose(candidate.token_logprobs, seen.token_logprobs, atol=1e-4)
            np.testing.assert_allclose(candidate.token_entropies, seen.token_entropies, atol=1e-4)


@pytest.mark.parametrize("sources", ["context", "problem"])
@pytest.mark.parametrize("cached", [(), PREFIX[:3], PREFIX, (*PREFIX, 70, 99), LONGER])
def test_blocks_do_not_depend_on_what_is_kept_of_the_prefix(
    engine: Engine, plain: ReferenceEngine, sources: str, cached: tuple[int, ...]
) -> None:
    engine.release("kept")
    if cached:
        run(engine, generate_job(engine, cached, 2, 4, key="kept"))
    steps = [[50, 51, 52], [50, 60]]
    job = score_job(steps, LONGER, key="kept", capture=capture(LONGER, sources))
    assert_same(run(engine, job), run(plain, job))


def test_blocks_keep_all_mass(engine: Engine) -> None:
    for sources in "context", "problem":
        for epsilon in 0.0, 0.01, 0.3:
            marked = capture(LONGER, sources, 3, epsilon)
            job = score_job([[50, 51, 52, 53]], LONGER, key="mass", capture=marked)
            [seen] = run(engine, job)
            assert len(seen.blocks) == 3
            for block in seen.blocks:
                assert block.step.shape == (4, 4)
                mass = block.source_mass + block.step.sum(-1)
                np.testing.assert_allclose(mass, 1.0, atol=1e-5)
                assert not np.triu(block.step, 1).any()
                assert (block.sink_mass > 0).all() == (not marked.is_source.all())


def test_jobs_of_a_batch_are_captured_as_each_asks(engine: Engine, plain: ReferenceEngine) -> None:
    jobs: list[ScoreJob] = [
        score_job(CONTINUATIONS, key=0, capture=capture(PREFIX, "context", 1)),
        score_job([[52]], OTHER_PREFIX, key=1),
        score_job([[50, 51], [50, 60]], LONGER, key=2, capture=capture(LONGER, "problem", 3)),
        score_job([[50, 51]], (9,), key=3, capture=capture((9,), "context", 2, 0.0)),
        score_job([[50, 51]], key=4, hidden_state=True, distributions=SAMPLING),
    ]
    for _ in range(2):
        for job, found in zip(jobs, run_together(engine, jobs), strict=True):
            assert_same(found, run(plain, job))


def test_a_scored_step_can_be_followed(engine: Engine, plain: ReferenceEngine) -> None:
    for index, step in enumerate(CONTINUATIONS):
        run(engine, score_job(CONTINUATIONS, key="followed"))
        prefix = (*PREFIX, *step)
        if index % 2:
            job: Any = generate_job(engine, prefix, 2, 5, key="followed")
        else:
            job = score_job([[80, 81], [82]], prefix, key="followed", capture=capture(prefix))
        assert_same(run(engine, job), run(plain, job))


def test_capture_is_refused_where_attention_cannot_be_read(engine: Engine) -> None:
    reason = "it has none"
    without: Engine
    if isinstance(engine, ReferenceEngine):
        tokenizer = engine.tokenizer
        without = ReferenceEngine(
            model=engine.model, tokenizer=tokenizer, reasons={"attention": reason}
        )
    else:
        from specguard.backends.local.engine import LocalEngine

        assert isinstance(engine, LocalEngine)
        without = LocalEngine("without", engine.layer, engine.tokenizer, 512, reason)
    assert "attention" in engine.features
    assert not engine.reasons
    assert "attention" not in without.features
    assert without.reasons["attention"] == reason
    with pytest.raises(SpecguardError, match="cannot be captured"):
        run(without, score_job([[50]], capture=capture(PREFIX)))
    job = score_job([[50]])
    assert_same(run(without, job), run(engine, job))


def test_more_layers_than_there_are_are_refused(
    loader: Callable[[Path], Engine], checkpoint: Path
) -> None:
    engine = loader(checkpoint)
    job = score_job([[50]], capture=capture(PREFIX, num_layers=5))
    with pytest.raises(SpecguardError, match="attention of 5 layers is asked for"):
        run(engine, job)


def test_a_padded_vocabulary_ends_with_the_tokenizer_s(
    draft: Engine, draft_checkpoint: Path
) -> None:
    """Rows of logits beyond the tokenizer's ids are no part of any distribution."""
    plain = ReferenceEngine.load(draft_checkpoint)
    jobs = [
        score_job([[963, 45]], hidden_state=True, distributions=Sampling(1.0, 1.0)),
        generate_job(draft, PREFIX, 5, 8, Sampling(5.0, 1.0), distributions=True),
    ]
    assert len(plain.model.weights["lm_head.weight"]) == 1088
    for job in jobs:
        found = run(draft, job)
        assert found[0].distributions.shape[-1] == 964
        assert_same(found, run(plain, job))


def test_what_a_job_cannot_ask_for_is_refused() -> None:
    with pytest.raises(ValueError, match="one token each"):
        score_job([[]])
    with pytest.raises(ValueError, match="one token each"):
        score_job([])
    with pytest.raises(ValueError, match="source or sink"):
        score_job([[50]], capture=capture(OTHER_PREFIX))

"""A draft's step that the target reads while it is drafted, and gives up once it is lost."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from specguard.core import (
    Candidate,
    DraftCost,
    GenerateJob,
    Observation,
    Sampling,
    ScoreJob,
    Solution,
    SolveConfig,
    Solver,
    VerifierConfig,
)
from specguard.core.loop import Solving
from specguard.core.pairing import Pair
from specguard.core.speculation import Lookahead
from tests.bigrams import bigram_engine
from tests.reference import ReferenceEngine
from tests.scripted import Scripted

CHEAP = DraftCost(0.15, verification=1.0, reading=0.04)
# Drafting is never paused; parts are read where half a step costs more than a pass, else they are
# not.
READ, UNREAD = DraftCost(0.01, verification=0.02), DraftCost(0.001, verification=0.02)
SUM = VerifierConfig(weights={"log_prob_sum": 1.0})
CONFIG = SolveConfig(
    draft_cost=CHEAP,
    num_candidates=1,
    verifier=replace(SUM, bounds={"log_prob": (-12.0, 0.0), "log_prob_sum": (-300.0, 0.0)}),
    delimiter="&",
    max_step_tokens=40,
    max_tokens=160,
)


class Counting(ReferenceEngine):
    """Keeps its jobs."""

    def __init__(self, like: ReferenceEngine, reasons: dict[Any, str]) -> None:
        super().__init__(model=like.model, reasons=reasons)
        self.num_tokens = like.num_tokens
        self.jobs: list[GenerateJob | ScoreJob] = []
        self.num_drafted = 0

    async def generate(self, job: GenerateJob) -> list[Candidate]:
        self.jobs.append(job)
        made = await super().generate(job)
        self.num_drafted += sum(len(each.token_ids) for each in made)
        return made

    async def score(self, job: ScoreJob) -> list[Observation]:
        self.jobs.append(job)
        return await super().score(job)


def pair(lacks: Sequence[str] = ()) -> tuple[Counting, Counting]:
    reasons: dict[Any, str] = dict.fromkeys(lacks, "so it is")
    return Counting(bigram_engine(1, 1), reasons), Counting(bigram_engine(1, 7), reasons)


def half_strict(config: SolveConfig) -> SolveConfig:
    """About half of the steps of the test's problems pass."""
    lenient = replace(config, verifier=replace(config.verifier, threshold=0.0), draft_cost=None)
    seen = [Solver(*pair(), lenient).solve(f"problem {number}") for number in range(4)]
    scores = [step.scores["ensemble"] for solution in seen for step in solution.steps]
    return replace(config, verifier=replace(config.verifier, threshold=float(np.median(scores))))


def told(solution: Solution) -> list[tuple[str, str]]:
    return [(step.text, step.decision) for step in solution.steps]


@pytest.mark.parametrize("lacks", [(), ("confidence",), ("choices",), ("confidence", "choices")])
@pytest.mark.parametrize("sampling", [Sampling(0.4, 0.9), Sampling(0.8, 0.9)])
@pytest.mark.parametrize("weights", [{"log_prob_sum": 1.0}, {"log_prob": 0.5, "entropy_max": 0.5}])
def test_the_solution_is_the_one_without_in_fewer_drafted_tokens(
    lacks: Sequence[str],
    sampling: Sampling | None,
    weights: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(
        CONFIG,
        sampling=sampling,
        verifier=replace(CONFIG.verifier, weights=weights),
        num_speculated=0,
    )
    config = half_strict(config)
    drafted = {True: 0, False: 0}
    decisions: set[str] = set()
    given_up = 0
    for text in (f"problem {number}" for number in range(4)):
        monkeypatch.setenv("SPECGUARD_REFERENCE", "1")
        plain = Solver(*pair(lacks), replace(config, draft_cost=None)).solve(text)
        monkeypatch.setenv("SPECGUARD_REFERENCE", "0")
        for reads_along in drafted:
            draft, target = pair(lacks)
            cost = READ if reads_along else UNREAD
            found = Solver(draft, target, replace(config, draft_cost=cost)).solve(text)
            assert told(found) == told(plain)
            assert all(step.is_given_up <= (step.decision == "rewritten") for step in found.steps)
            assert any(step.is_given_up for step in found.steps) <= reads_along
            assert found.stats.num_drafted_tokens == draft.num_drafted
            assert found.stats.num_verified_tokens <= len(found.text) + draft.num_drafted
            drafted[reads_along] += draft.num_drafted
            decisions |= {step.decision for step in found.steps}
            given_up += sum(step.is_given_up for step in found.steps)
    assert decisions == {"accepted", "rewritten"}
    assert given_up > 0
    assert drafted[True] < drafted[False]


def test_a_rewrite_of_a_step_that_was_given_up_has_the_target_s_own_token_in_its_place() -> None:
    draft, target = pair()
    config = half_strict(replace(CONFIG, num_speculated=0, sampling=Sampling(0.8, 0.9)))
    solution = Solver(draft, target, replace(config, draft_cost=READ)).solve("problem 1")
    assert any(step.is_given_up for step in solution.steps)
    for step in solution.steps:
        if step.is_given_up:
            assert step.draft_text is not None
            kept = step.draft_text[: step.num_reused]
            assert step.text.startswith(kept)
            assert step.text[step.num_reused :][:1] != step.draft_text[step.num_reused :][:1]
    scored = [job for job in target.jobs if isinstance(job, ScoreJob)]
    assert all(job.choices for job in scored)
    # What was read is not read again: each part goes on where the one before it ended.
    for first, second in pairwise(scored):
        if second.prefix[: len(first.prefix)] == first.prefix:
            assert len(second.prefix) >= len(first.prefix)


@pytest.mark.parametrize("problem", ["problem 1", "problem 3"])
def test_a_detailed_record_changes_no_solution(problem: str) -> None:
    config = half_strict(replace(CONFIG, sampling=Sampling(0.8, 0.9)))
    config = replace(config, draft_cost=replace(CHEAP, candidate=0.3))
    plain = Solver(*pair(), config).solve(problem)
    found = Solver(*pair(), config).solve(problem, detail=True)
    assert told(found) == told(plain)
    assert [step.is_given_up for step in found.steps] == [step.is_given_up for step in plain.steps]
    assert any(step.is_given_up for step in found.steps)
    for step in found.steps:
        if step.decision != "plain":
            assert step.tokens is not None
            assert step.tokens.grounding is not None
            assert len(step.tokens.grounding) == len(step.tokens.logprobs) == step.num_drafted


def test_the_target_s_pace_is_what_drafting_is_compared_with() -> None:
    """Where guesses fail, the target writes alone at its own pace, and a pause is whole steps."""
    draft, target = pair()
    config = replace(CONFIG, num_candidates=1, delimiter="\x05")
    solving = Solving("problem 1", Pair(draft, target), str, config)  # type: ignore[arg-type]
    while solving.lookahead.num_ahead:
        solving.lookahead.saw(8, 0, 1)
    assert solving.lookahead.num_ahead == 0

    async def write() -> None:
        await solving._write_on()

    asyncio.run(write())
    assert solving.fallback.pace == 1.0
    assert solving.lookahead.num_ahead > 0


def test_what_may_yet_rise_is_read_whole() -> None:
    assert SUM.can_only_fall
    for weights in ({"log_prob_mean": 1.0}, {"log_prob": 0.5, "grounding": 0.5}):
        assert not replace(SUM, weights=weights).can_only_fall
    assert not replace(SUM, bounds={"log_prob_sum": (0.0, -15.0)}).can_only_fall
    config = replace(CONFIG, verifier=VerifierConfig(weights={"log_prob_mean": 1.0}))
    solution = Solver(*pair(), config).solve("problem 1")
    assert not any(step.is_given_up for step in solution.steps)


def test_the_last_token_of_a_step_is_as_far_as_it_goes() -> None:
    """A part that ends with the step's cap is its end, and nothing is asked for behind it."""
    cap = 24

    def write(job: GenerateJob) -> list[str]:
        start = len(job.prefix)
        return ["".join(chr(33 + (start + i) ** 2 % 89) for i in range(job.boundary.max_tokens))]

    draft = Scripted("d", write)
    draft.features = draft.features - {"confidence"}
    target = Scripted("t", ["end.\n\n"], default_logprob=-0.001)
    config = SolveConfig(
        num_candidates=1, draft_cost=CHEAP, verifier=SUM, max_step_tokens=cap, max_tokens=2 * cap
    )
    solution = Solver(draft, target, config).solve("p")
    assert [len(job.uniforms[0]) for job in draft.generated if job.uniforms is not None] == [
        cap,
        cap,
    ]
    assert [step.num_tokens for step in solution.steps] == [cap, cap]
    assert solution.finish_reason == "length"


def test_a_guess_ends_where_one_more_token_costs_more_than_it_is_worth() -> None:
    def ahead(cost: DraftCost, **settings: Any) -> Lookahead:
        return Lookahead(SolveConfig(draft_cost=cost, **settings), is_confident=True)

    cheap, dear = ahead(CHEAP), ahead(replace(CHEAP, candidate=0.3))
    assert 0 < cheap.least_confidence < dear.least_confidence < 1
    assert cheap.num_ahead == dear.num_ahead > 16
    for _ in range(30):
        cheap.saw(8, 0, 1)
    assert (cheap.num_ahead, cheap.pace) == (0, 1.0)
    # Method sd has nothing else to do; what somebody asks for is done to the token.
    hopeless = ahead(DraftCost(2.0), method="sd")
    assert hopeless.num_ahead == 1
    assert ahead(CHEAP, num_speculated=5).least_confidence == 0
    assert ahead(CHEAP, num_speculated=5).num_ahead == 5


@pytest.mark.parametrize("sampling", [None, Sampling(0.9, 0.95)])
def test_guesses_that_end_early_leave_the_text_as_it_is(sampling: Sampling | None) -> None:
    for text in ("problem 1", "problem 2"):
        config = replace(CONFIG, method="sd", sampling=sampling)
        draft, target = pair()
        found = Solver(draft, target, config).solve(text)
        guesses = [job for job in draft.jobs if isinstance(job, GenerateJob)]
        assert all(job.least_confidence > 0 for job in guesses)
        assert draft.num_drafted < sum(job.boundary.max_tokens for job in guesses)
        assert found.stats.num_guessed_tokens == draft.num_drafted
        if sampling is None:
            assert found.text == Solver(*pair(), replace(config, method="target")).solve(text).text
        else:
            again = Solver(*pair(), config).solve(text)
            assert again.text == found.text

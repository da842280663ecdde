"""The target puts a token in place of the one that it doubts, and the draft goes on behind it."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

import specguard
from specguard.core import (
    DraftCost,
    GenerateJob,
    Observation,
    Sampling,
    ScoreJob,
    Solution,
    SolveConfig,
    Solver,
    UsageError,
    VerifierConfig,
)
from specguard.core.fallback import Fallback
from specguard.models.tiny import problems
from specguard.wording import acceptance, label
from tests.scripted import Scripted

WRONG, MENDED, ANSWER = "7-5=3.\n\n", "7-5=2.\n\n", "So \\boxed{2}.\n\n"
PROMPT = "\x01p\x02"
CORRECTING = VerifierConfig(
    weights={"log_prob": 1.0}, bounds={"log_prob": (-2.0, 0.0)}, num_corrections=2
)


def doubting(text: str, place: int, logprob: float = -1.9) -> list[float]:
    values = [-0.1] * len(text)
    values[place] = logprob
    return values


def run(draft: Scripted, target: Scripted, **settings: object) -> Solution:
    settings = {"verifier": CORRECTING, **settings}
    return Solver(draft, target, SolveConfig(**settings)).solve("p")  # type: ignore[arg-type]


def going_on(*first: str, behind: dict[str, str]) -> Callable[[GenerateJob], list[str]]:
    """Steps one after the other; ``behind`` says how a step goes on that has begun so."""
    steps = iter(first)

    def write(job: GenerateJob) -> list[str]:
        begun = "".join(map(chr, job.boundary.begun))
        return [behind[begun] if begun else next(steps)]

    return write


def test_the_draft_goes_on_behind_the_target_s_token() -> None:
    draft = Scripted("d", going_on(WRONG, ANSWER, behind={"7-5=2": ".\n\n"}))
    target = Scripted("t", going_on(behind={"7-5=": "2"}), logprobs={WRONG: doubting(WRONG, 4)})
    solution = run(draft, target)
    assert solution.text == MENDED + ANSWER
    first = solution.steps[0]
    assert (first.decision, first.author, first.draft_text) == ("corrected", "draft", WRONG)
    assert first.corrected_places == (4,)
    assert first.num_drafted == len(WRONG) + len(".\n\n")
    # What came of it is verified as a whole, and all of it stands behind the text so far alone.
    assert target.scored_texts == [[WRONG], [MENDED], [ANSWER]]
    assert [target.prefix_of(job) for job in target.jobs] == [
        PROMPT,
        PROMPT + "7-5=",
        PROMPT,
        PROMPT + MENDED,
    ]
    assert [draft.prefix_of(job) for job in draft.jobs] == [
        PROMPT,
        PROMPT + "7-5=2",
        PROMPT + MENDED,
    ]
    assert [job.boundary.max_tokens for job in target.generated] == [1]
    stats = solution.stats
    assert (stats.num_target_tokens, stats.num_accepted_steps) == (1, 1)
    assert stats.num_corrected_steps == 1
    assert stats.num_verified_tokens == len(WRONG + MENDED + ANSWER)
    assert label(first) == "accepted draft, 1 token corrected by target"
    assert acceptance(solution) == (
        "accepted 1 of 2 drafted steps and 1 once corrected, "
        f"{len(ANSWER) / len(MENDED + ANSWER):.0%} of their tokens"
    )
    assert Solution.from_json(solution.to_json()) == solution


def test_what_is_doubted_again_is_rewritten_from_there() -> None:
    again = "7-5=2,so\n\n"
    draft = Scripted("d", going_on(WRONG, ANSWER, behind={"7-5=2": ",so\n\n"}))
    target = Scripted(
        "t",
        going_on(behind={"7-5=": "2", "7-5=2": ".\n\n"}),
        logprobs={WRONG: doubting(WRONG, 4), again: doubting(again, 5)},
    )
    verifier = VerifierConfig(
        weights={"log_prob": 1.0}, bounds={"log_prob": (-2.0, 0.0)}, num_corrections=1
    )
    solution = run(draft, target, verifier=verifier)
    assert solution.text == MENDED + ANSWER
    first = solution.steps[0]
    assert (first.decision, first.author, first.draft_text) == ("rewritten", "target", WRONG)
    assert (first.corrected_places, first.num_reused) == ((4,), 4)
    assert solution.stats.num_target_tokens == 1 + len(".\n\n")


def test_a_correction_may_end_the_step() -> None:
    step = "Yes.!"
    draft = Scripted("d", going_on(step, behind={}))
    target = Scripted("t", going_on(behind={"Yes.": "$"}), logprobs={step: doubting(step, 4)})
    solution = run(draft, target)
    assert (solution.text, solution.finish_reason) == ("Yes.", "eos")
    assert solution.steps[0].decision == "corrected"
    assert len(draft.jobs) == 1


def test_an_earlier_doubt_drops_the_corrections_behind_it() -> None:
    second = "7-5=2!\n\n"
    draft = Scripted("d", going_on(WRONG, ANSWER, behind={"7-5=2": "!\n\n", "7-4": "=3.\n\n"}))
    target = Scripted(
        "t",
        going_on(behind={"7-5=": "2", "7-": "4"}),
        logprobs={WRONG: doubting(WRONG, 4), second: doubting(second, 2)},
    )
    solution = run(draft, target)
    assert solution.text == "7-4=3.\n\n" + ANSWER
    assert solution.steps[0].corrected_places == (2,)


def test_nothing_is_corrected_where_there_is_nothing_else_to_write() -> None:
    """The target would have written all of it, or the step has no room for two tokens more."""
    for settings, first_choices in (({}, len(WRONG)), ({"max_step_tokens": 5}, 0)):
        text = WRONG[:5] if settings else WRONG
        draft = Scripted("d", [text, ANSWER])
        target = Scripted(
            "t",
            [MENDED[:1]],
            logprobs={text: doubting(text, 4)},
            first_choices={text: first_choices},
        )
        solution = run(draft, target, max_steps=1, **settings)
        assert solution.steps[0].decision == "rewritten"
        assert solution.steps[0].corrected_places == ()


def test_the_target_s_token_is_drawn_as_a_rewrite_and_the_draft_goes_on_greedily() -> None:
    draft = Scripted("d", going_on(WRONG, ANSWER, behind={"7-5=2": ".\n\n"}))
    target = Scripted("t", going_on(behind={"7-5=": "2"}), logprobs={WRONG: doubting(WRONG, 4)})
    run(draft, target, rewrite_sampling=Sampling(0.7, 1.0), sampling=Sampling(0.9, 1.0))
    assert [job.sampling for job in target.generated] == [Sampling(0.7, 1.0)]
    assert draft.generated[1].sampling.is_greedy
    assert target.generated[0].uniforms is not None
    assert draft.generated[0].uniforms is not None
    assert target.generated[0].uniforms[0, 0] != draft.generated[0].uniforms[0, 0]


@given(st.integers(0, 5), st.lists(st.integers(0, 7), min_size=1, max_size=6))
def test_counts_agree_whatever_is_doubted(num_corrections: int, places: list[int]) -> None:
    """Every token of the text is the draft's or the target's, and each is counted once."""
    doubts = iter(places)

    class Doubting(Scripted):
        def _observe(self, job: ScoreJob, token_ids: tuple[int, ...]) -> Observation:
            seen = super()._observe(job, token_ids)
            place = next(doubts, None)
            if place is not None and len(token_ids) > place + 1:
                seen.token_logprobs[place] = -1.9
            return seen

    def draft_step(job: GenerateJob) -> list[str]:
        return ["abcdefg\n\n"[len(job.boundary.begun) :]]

    draft = Scripted("d", draft_step)
    target = Doubting("t", lambda job: ["abcdefg\n\n"[len(job.boundary.begun) :]])
    verifier = VerifierConfig(
        weights={"log_prob": 1.0}, bounds={"log_prob": (-2.0, 0.0)}, num_corrections=num_corrections
    )
    solution = run(draft, target, verifier=verifier, max_steps=2)
    for step in solution.steps:
        assert step.text == "abcdefg\n\n"
        assert list(step.corrected_places) == sorted(set(step.corrected_places))
        assert (step.decision == "corrected") <= bool(step.corrected_places)
    stats = solution.stats
    num_drafts = sum(
        step.num_tokens - len(step.corrected_places) if step.author == "draft" else step.num_reused
        for step in solution.steps
    )
    assert stats.num_target_tokens + num_drafts == stats.num_tokens
    num_rewrites = sum(job.boundary.max_tokens > 1 for job in target.generated)
    assert num_rewrites <= sum(step.decision == "rewritten" for step in solution.steps)


def test_corrections_cost_a_token_and_a_verification_each() -> None:
    cost = DraftCost(0.1, verification=2.0)
    paying, dear = Fallback(cost), Fallback(cost)
    for _ in range(5):
        paying.saw_drafted(1, 10, 10, 10, 0, num_corrections=0)
        dear.saw_drafted(1, 10, 10, 10, 0, num_corrections=5)
    assert not paying.is_on
    assert dear.is_on


def test_corrections_need_a_target_that_doubts() -> None:
    for changes in {"rewrite_from": "start"}, {"model": "draft"}, {"num_corrections": -1}:
        with pytest.raises(UsageError):
            VerifierConfig(**{"num_corrections": 1, **changes})  # type: ignore[arg-type]
    assert VerifierConfig(num_corrections=3).asking("draft").num_corrections == 0


@pytest.fixture(scope="module")
def built_in() -> tuple[Solver, list[str]]:
    solver = specguard.load("tiny", draft_cost=None, backend="cpu")
    verifier = {"rewrite_from": "doubt", "num_corrections": 3, "threshold": 0.95}
    solver.config = replace(solver.config, verifier=replace(solver.config.verifier, **verifier))
    return solver, [each.text for each in islice(problems.stream(problems.HELD_OUT), 12)]


def test_neither_a_batch_nor_a_kept_sequence_changes_a_corrected_solution(
    built_in: tuple[Solver, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Corrections go on from branches of what was scored and drawn before."""
    solver, texts = built_in
    together = {done.index: done.solution for done in specguard.solve_many(solver, texts)}
    decisions = [step.decision for found in together.values() if found for step in found.steps]
    assert {"accepted", "corrected"} <= set(decisions)
    monkeypatch.setenv("SPECGUARD_REFERENCE", "1")
    plain = specguard.load("tiny", draft_cost=None, backend="cpu")
    plain.config = solver.config
    for index, text in enumerate(texts):
        found = together[index]
        assert found is not None
        for other in solver.solve(text), plain.solve(text):
            assert other.text == found.text
            assert [s.corrected_places for s in other.steps] == [
                s.corrected_places for s in found.steps
            ]

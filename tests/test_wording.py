"""What is said of steps and solutions: it has to be so."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specguard import wording
from specguard.core import DraftCost, Solution, SolveConfig, Solver, StepRecord, VerifierConfig
from tests.scripted import Scripted

WRONG, RIGHT, ANSWER = "wrong.\n\n", "right.\n\n", "So \\boxed{7}.\n\n"
BOUNDS = {"log_prob": (-2.0, 0.0)}
ONE_SIGNAL = VerifierConfig(weights={"log_prob": 1.0}, bounds=BOUNDS)
TWO_SIGNALS = VerifierConfig(weights={"log_prob": 0.5, "grounding": 0.5}, bounds=BOUNDS)
NO_SIGNAL = VerifierConfig(weights={}, threshold=0.0)


def step(score: float = 0.95, threshold: float = 0.7, **changes: Any) -> StepRecord:
    scores = {"log_prob": score, "grounding": 1.0, "consistency": 1.0, "ensemble": score}
    judged = StepRecord(
        index=0,
        text=RIGHT,
        author="draft",
        decision="accepted" if score >= threshold else "rewritten",
        num_tokens=8,
        num_drafted=8,
        signals={},
        scores=scores,
        threshold=threshold,
        seconds={},
    )
    return replace(judged, **changes)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"verifier": ONE_SIGNAL}, "log-prob 0.95 >= 0.70"),
        ({"verifier": ONE_SIGNAL, "num_candidates": 4}, "log-prob 0.95 >= 0.70 (consistency 1.00)"),
        ({"verifier": TWO_SIGNALS}, "ensemble 0.95 >= 0.70 (log-prob 0.95, grounding 1.00)"),
        ({"verifier": NO_SIGNAL, "selector": "draft"}, "not verified"),
        (
            {"verifier": NO_SIGNAL, "selector": "draft", "num_candidates": 4},
            "not verified, consistency 1.00",
        ),
    ],
)
def test_a_verdict_names_what_decided(settings: dict[str, Any], said: str) -> None:
    assert wording.verdict(step(), SolveConfig(**settings)) == said


def test_a_reward_that_decides_is_called_one() -> None:
    judged = step(scores={"reward": 0.25, "ensemble": 0.25}, decision="rewritten")
    config = SolveConfig(method="rsd", verifier=TWO_SIGNALS)
    assert wording.verdict(judged, config) == "reward 0.25 < 0.70"


def test_what_nothing_judged_has_no_verdict() -> None:
    plain = replace(step(decision="plain", scores={}), threshold=None)
    assert wording.verdict(plain, SolveConfig(method="target")) == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "accepted draft"),
        ({"decision": "rewritten", "draft_text": WRONG}, "rewritten by target"),
        (
            {"decision": "rewritten", "draft_text": WRONG, "num_reused": 2},
            "rewritten by target, 2 tokens kept",
        ),
        (
            {"decision": "rewritten", "draft_text": RIGHT.strip()},
            "rejected draft, target wrote the same",
        ),
        ({"decision": "plain", "author": "target"}, "target"),
        ({"decision": "plain", "author": "target", "is_fallback": True}, "target, no draft"),
        ({"decision": "plain", "author": "draft"}, "draft"),
    ],
)
def test_a_label_says_whose_step_it_is(changes: dict[str, Any], said: str) -> None:
    assert wording.label(step(**changes)) == said


@pytest.mark.parametrize(
    ("score", "threshold", "said"),
    [
        (0.6999, 0.7, ("0.6999", "0.7000")),
        (0.695, 0.7, ("0.69", "0.70")),
        (0.7, 0.7, ("0.70", "0.70")),
        (0.1, 0.7, ("0.10", "0.70")),
    ],
)
def test_numbers_have_as_many_digits_as_tell_them_apart(
    score: float, threshold: float, said: tuple[str, str]
) -> None:
    assert wording.compared(score, threshold) == said


@given(st.floats(0, 1), st.floats(0, 1))
def test_numbers_are_in_the_order_that_was_found(score: float, threshold: float) -> None:
    first, second = map(float, wording.compared(score, threshold))
    assert (first >= second) == (score >= threshold)


def solve(draft: list[Any], target: list[Any], **settings: Any) -> Solution:
    engines = Scripted("d", draft), Scripted("t", target, logprobs={WRONG: -1.9})
    return Solver(*engines, SolveConfig(**{"verifier": ONE_SIGNAL, **settings})).solve("p")


def rewriting(num_rejected: int, num_accepted: int, **settings: Any) -> Solution:
    """That many steps of each kind, and behind them plain ones where drafting is paused."""
    drafted = [WRONG] * num_rejected + [f"{i}.\n\n" for i in range(num_accepted - 1)] + [ANSWER]
    written = [f"{chr(ord('a') + i)}.\n\n" for i in range(num_rejected)] + [ANSWER]
    return solve(drafted, written, **settings)


def test_acceptance_has_one_denominator() -> None:
    assert wording.acceptance(rewriting(1, 2)) == (
        "accepted 2 of 3 drafted steps, 83% of their tokens"
    )
    paused = rewriting(3, 1, draft_cost=DraftCost(0.3))
    num_drafted = 4 - paused.stats.num_fallback_steps
    assert num_drafted < 4
    assert f"accepted 0 of {num_drafted} drafted step" in (wording.acceptance(paused) or "")
    assert wording.acceptance(solve([ANSWER], [ANSWER], method="target")) is None


@pytest.mark.parametrize(
    ("num_rejected", "num_accepted", "is_said"),
    [(3, 1, False), (5, 1, True), (2, 1, False), (0, 3, False)],
)
def test_a_pair_that_accepts_almost_nothing_is_told_of(
    num_rejected: int, num_accepted: int, is_said: bool
) -> None:
    said = wording.misfit(rewriting(num_rejected, num_accepted))
    assert (said is not None) == is_said
    uncalibrated = VerifierConfig(weights={"log_prob": 1.0}, threshold=0.9)
    said = wording.misfit(rewriting(num_rejected, num_accepted, verifier=uncalibrated))
    assert (said is not None) == is_said
    if said is not None:
        assert f"{num_accepted} of {num_rejected + num_accepted} drafted steps" in said
        assert "specguard calibrate" in said
        assert "--dtype" in said


@pytest.mark.parametrize(
    ("solution", "reason", "advice"),
    [
        (lambda: solve([RIGHT], [], max_tokens=12), "cut after 12 tokens", "--max-tokens"),
        (lambda: solve([RIGHT], [], max_steps=2), "cut after 2 steps", "--max-steps"),
        (lambda: solve([RIGHT], [], max_steps=1), "cut after 1 step", "--max-steps"),
        (lambda: solve([RIGHT], []), "the text went round in circles", "--seed"),
        (lambda: solve(["$"], []), "the model ended without a word", "--system-prompt"),
    ],
)
def test_advice_follows_the_finish_reason(solution: Any, reason: str, advice: str) -> None:
    found = wording.no_answer(solution())
    assert found[0] == reason
    assert advice in found[1]


def test_a_full_context_window_is_called_one() -> None:
    narrow = Scripted("t", ["1.\n\n", "2.\n\n", "3.\n\n", "4.\n\n"], context_limit=12)
    cut = Solver(target=narrow, config=SolveConfig(method="target")).solve("p")
    assert cut.finish_reason == "length"
    reason, advice = wording.no_answer(cut)
    assert reason == "the context window is full after 9 tokens"
    assert "longer context" in advice

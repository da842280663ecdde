"""Drafting that does not pay is switched off, and tried again; candidates that agree are spared."""

import pytest

from specguard.core import DraftCost, SolveConfig, Solver, UsageError, VerifierConfig
from specguard.core.fallback import Fallback
from tests.bigrams import bigram_engine
from tests.scripted import Scripted

STEP, ANSWER, WRONG, RIGHT = "some fact.\n\n", "So \\boxed{7}.\n\n", "wrong.\n\n", "right.\n\n"
LOG_PROB = VerifierConfig(weights={"log_prob": 1.0}, bounds={"log_prob": (-2.0, 0.0)})
VARIED = [f"fact {number} of many.\n\n" for number in range(40)]


def test_a_step_costs_drafting_verifying_and_rewriting() -> None:
    cost = DraftCost(candidate=0.25, further=0.05, verification=2.0)
    assert cost.of_step(num_candidates=1, num_longest=12) == pytest.approx(0.25 * 12 + 2)
    assert cost.of_step(num_candidates=5, num_longest=10) == pytest.approx(0.45 * 10 + 2)
    with pytest.raises(UsageError, match="negative"):
        DraftCost(-0.1)


def test_drafting_goes_on_while_it_pays() -> None:
    fallback = Fallback(DraftCost(0.4, verification=1.0))
    for _ in range(50):  # 10 tokens cost 5 where accepted: two of three pay for the third
        for is_accepted in (True, True, False):
            assert not fallback.is_on
            fallback.saw_drafted(1, 10, 10, 0 if is_accepted else 10)
    assert not fallback.is_on


def test_pauses_double_while_drafting_does_not_pay_and_begin_anew_when_it_did() -> None:
    fallback = Fallback(DraftCost(0.4, verification=1.0))

    def pause_after(*outcomes: bool) -> int:
        for is_accepted in outcomes:
            fallback.saw_drafted(1, 10, 10, 0 if is_accepted else 10)
        length = 0
        while fallback.is_on:
            fallback.saw_plain()
            length += 1
        return length

    bad, good = (False, False, True), (True, True, True)
    assert [pause_after(*bad) for _ in range(5)] == [4, 8, 16, 32, 32]
    assert pause_after(*good) == 0
    assert pause_after(*bad) == 4


def test_without_a_cost_drafting_never_stops() -> None:
    fallback = Fallback(None)
    for _ in range(20):
        fallback.saw_drafted(16, 100, 1, 1)
    assert not fallback.is_on


def test_a_switch_is_in_the_records_and_the_statistics() -> None:
    draft = Scripted("d", [WRONG] * 8)
    target = Scripted("t", [*VARIED[:9], ANSWER], logprobs={WRONG: -1.9})
    config = SolveConfig(num_candidates=1, verifier=LOG_PROB, draft_cost=DraftCost(0.5))
    solution = Solver(draft, target, config).solve("p")
    decisions = [step.decision for step in solution.steps]
    assert decisions == ["rewritten"] * 3 + ["plain"] * 4 + ["rewritten"] * 3
    assert [step.is_fallback for step in solution.steps] == [False] * 3 + [True] * 4 + [False] * 3
    assert all(step.author == "target" for step in solution.steps)
    stats = solution.stats
    assert (stats.num_fallbacks, stats.num_fallback_steps) == (1, 4)
    assert stats.num_drafted_tokens == 6 * len(WRONG)
    assert stats.step_acceptance_rate == 0


def test_candidates_that_agree_spare_the_others() -> None:
    draft = Scripted("d", [[STEP, STEP], [ANSWER, WRONG], [ANSWER, ANSWER]])
    config = SolveConfig(num_candidates=4, num_first_candidates=2, verifier=LOG_PROB)
    solution = Solver(draft, Scripted("t", []), config).solve("p")
    assert solution.text == STEP + ANSWER
    assert [step.num_spared for step in solution.steps] == [2, 0]
    assert solution.stats.num_spared_candidates == 2
    assert [step.num_drafted for step in solution.steps] == [
        2 * len(STEP),
        3 * len(ANSWER) + len(WRONG),
    ]
    jobs = [(job.num_candidates, job.first_candidate) for job in draft.generated]
    assert jobs == [(2, 0), (2, 0), (2, 2)]
    # The further ones are drawn from where the first ones were.
    assert draft.generated[1].prefix == draft.generated[2].prefix


@pytest.mark.parametrize("selector", ["draft", "target"])
def test_drawn_in_two_goes_candidates_are_those_of_one_go(selector: str) -> None:
    """So wherever the first ones disagree, nothing but the number of calls changes."""
    settings = {
        "verifier": VerifierConfig(weights={"log_prob": 1.0}, bounds={"log_prob": (-30.0, 0.0)}),
        "selector": selector,
        "delimiter": " ",
        "max_step_tokens": 9,
        "max_tokens": 80,
        "detail": True,
    }
    config = SolveConfig(num_candidates=6, **settings)  # type: ignore[arg-type]
    solver = Solver(bigram_engine(1, 1), bigram_engine(1, 2), config)
    num_compared = 0
    for text in ("first", "second", "third"):
        at_once, twice = solver.solve(text), solver.solve(text, num_first_candidates=2)
        assert at_once.text == twice.text
        for one, other in zip(at_once.steps, twice.steps, strict=True):
            if not other.num_spared:
                assert one.candidates == other.candidates
                num_compared += 1
    assert num_compared > 3


def test_impossible_first_candidates_are_refused() -> None:
    for number in (1, 5):
        with pytest.raises(UsageError, match="drawn first"):
            SolveConfig(num_candidates=4, num_first_candidates=number)

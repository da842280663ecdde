"""Drafting that does not pay is switched off, and tried again; candidates that agree are spared."""

import pytest

from specguard.core import DraftCost, SolveConfig, Solver, UsageError, VerifierConfig
from specguard.core.fallback import Fallback
from tests.bigrams import bigram_engine
from tests.scripted import Scripted

STEP, ANSWER, WRONG, RIGHT = "some fact.\n\n", "So \\boxed{7}.\n\n", "wrong.\n\n", "right.\n\n"
LOG_PROB = VerifierConfig(weights={"log_prob": 1.0}, bounds={"log_prob": (-2.0, 0.0)})
VARIED = [f"fact {number} of many.\n\n" for number in range(40)]


def test_a_step_costs_drafting_reading_verifying_and_rewriting() -> None:
    cost = DraftCost(candidate=0.25, further=0.05, verification=2.0, reading=0.1)
    assert cost.of_step(1, num_longest=12, num_read=12) == pytest.approx(0.25 * 12 + 2 + 1.2)
    assert cost.of_step(5, num_longest=10, num_read=40) == pytest.approx(0.45 * 10 + 2 + 4)
    # Of a typical step of 30 tokens.
    assert DraftCost(0.5, verification=2.0, reading=0.1).at_best(1) == pytest.approx(0.5 + 1 / 6)
    assert cost.at_best(5, num_verified=5) == pytest.approx(0.45 + 2 / 30 + 0.5)


@pytest.mark.parametrize("figures", [(-0.1,), (0.5, 0.0, float("inf")), (float("nan"),)])
def test_a_cost_that_is_none_is_refused(figures: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="must be a number and not negative"):
        DraftCost(*figures)


def after(fallback: Fallback, *outcomes: bool) -> int:
    """Steps of 10 tokens, accepted or rewritten whole; how many the target then writes alone."""
    for is_accepted in outcomes:
        assert not fallback.is_on
        fallback.saw_drafted(1, 10, 10, 10, 0 if is_accepted else 10)
    length = 0
    while fallback.is_on and length < 100:
        fallback.saw_plain()
        length += 1
    return length


def test_drafting_goes_on_while_it_pays() -> None:
    # 10 tokens cost 5 where they are accepted and 15 else: as many of one as of the other.
    fallback = Fallback(DraftCost(0.4, verification=1.0))
    for _ in range(50):
        assert after(fallback, True, False) == 0
    # However much was gained before, no more than a step of the target's is lost.
    assert after(fallback, True, False, False) == 0
    assert after(fallback, False) == 4


def test_pauses_double_while_drafting_does_not_pay_and_begin_anew_when_it_did() -> None:
    fallback = Fallback(DraftCost(0.4, verification=1.0))
    assert after(fallback, False, False, False) == 4
    assert [after(fallback, False, False) for _ in range(4)] == [8, 16, 32, 32]
    assert after(fallback, True, True) == 0
    assert after(fallback, False, False, False) == 4


def test_where_little_can_be_won_little_is_risked() -> None:
    # An accepted step of 30 tokens brings 0.1 of a step back, a rejected one costs 0.9.
    assert after(Fallback(DraftCost(0.9, verification=0.0)), False) == 4
    # By the target's pace with guesses, not by its own.
    fallback = Fallback(DraftCost(0.4, verification=0.0))
    assert after(fallback, False, False) == 0
    fallback = Fallback(DraftCost(0.4, verification=0.0))
    fallback.pace = 0.45
    assert after(fallback, False) == 4


def test_a_long_step_counts_by_its_own_length() -> None:
    """A rejected step of 300 tokens says no more than one of 3: it is one step."""
    fallback = Fallback(DraftCost(0.5, verification=0.0))
    for length in (300, 3):
        fallback.saw_drafted(1, length, length, length, length)
    assert not fallback.is_on
    fallback.saw_drafted(1, 3, 3, 3, 3)
    assert fallback.is_on


def test_what_stands_of_a_rejected_step_is_not_lost() -> None:
    kept, lost = Fallback(DraftCost(0.3, verification=0.0)), Fallback(DraftCost(0.3))
    for _ in range(9):
        kept.saw_drafted(1, 10, 10, 10, 7)
    assert not kept.is_on
    assert after(lost, False, False, False) == 4


def test_drafting_that_cannot_pay_is_never_begun() -> None:
    hopeless = Fallback(DraftCost(0.6, verification=13.0))  # 30 tokens read cost 13 decode steps
    assert hopeless.at_best == pytest.approx(0.6 + 13 / 30)
    assert after(hopeless) == 100
    assert not Fallback(DraftCost(0.5, verification=13.0)).is_on
    assert not Fallback(DraftCost(0.5, further=0.1), num_candidates=5).is_on
    assert Fallback(DraftCost(0.5, further=0.1), num_candidates=6).is_on
    assert Fallback(DraftCost(0.5, reading=0.1), num_candidates=8, num_verified=8).is_on


def test_without_a_cost_drafting_never_stops() -> None:
    fallback = Fallback(None)
    for _ in range(20):
        fallback.saw_drafted(16, 100, 100, 1, 1)
    assert not fallback.is_on
    assert fallback.at_best == 0


def test_a_switch_is_in_the_records_and_the_statistics() -> None:
    draft = Scripted("d", [WRONG] * 8)
    target = Scripted("t", [*VARIED[:9], ANSWER], logprobs={WRONG: -1.9})
    # 8 tokens drafted for 2.4 and read for 1, then 18 written: 1.19 of what the target takes.
    cost = DraftCost(0.3, verification=1.0)
    config = SolveConfig(verifier=LOG_PROB, draft_cost=cost)
    solution = Solver(draft, target, config).solve("p")
    decisions = [step.decision for step in solution.steps]
    assert decisions == ["rewritten"] * 6 + ["plain"] * 4
    assert [step.is_fallback for step in solution.steps] == [False] * 6 + [True] * 4
    assert all(step.author == "target" for step in solution.steps)
    stats = solution.stats
    assert (stats.num_fallbacks, stats.num_fallback_steps) == (1, 4)
    assert stats.num_drafted_tokens == 6 * len(WRONG)
    assert stats.step_acceptance_rate == 0


def test_candidates_that_the_target_reads_to_select_are_paid_for() -> None:
    long = "something that it takes many tokens to say.\n\n"
    draft = Scripted("d", [[f"fact {number}.\n\n", long] for number in range(9)])
    target = Scripted("t", VARIED, logprobs={long: -1.9})
    config = SolveConfig(
        num_candidates=2,
        selector="target",
        verifier=LOG_PROB,
        draft_cost=DraftCost(0.05, verification=0.0, reading=0.2),
        max_steps=9,
    )
    # Of a step of 9 tokens: 45 drafted for 2.25, and 54 read for 10.8.
    selecting = Solver(draft, target, config).solve("p")
    assert [step.decision for step in selecting.steps] == ["accepted"] * 3 + ["plain"] * 4 + [
        "accepted"
    ] * 2
    # The medoid alone is read for 1.8.
    medoid = Solver(draft, target, config).solve("p", selector="ngram")
    assert not any(step.is_fallback for step in medoid.steps)


def test_a_plain_method_has_nothing_to_fall_back_from() -> None:
    hopeless = DraftCost(2.0)
    draft, target = Scripted("d", [STEP, ANSWER]), Scripted("t", [RIGHT, ANSWER])
    solver = Solver(draft, target, SolveConfig(verifier=LOG_PROB, draft_cost=hopeless))
    alone = solver.solve("p")
    assert [(step.author, step.is_fallback) for step in alone.steps] == [("target", True)] * 2
    assert not draft.jobs
    for method, author in ("draft", "draft"), ("target", "target"):
        steps = solver.solve("p", method=method).steps
        assert [(step.author, step.is_fallback) for step in steps] == [(author, False)] * 2


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

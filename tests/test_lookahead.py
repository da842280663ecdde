"""How far the draft guesses ahead of the target, and steps that the target writes so."""

from dataclasses import replace
from itertools import islice
from typing import Any

import pytest

import specguard
from specguard.core import (
    DraftCost,
    Sampling,
    SolveConfig,
    Solver,
    SpecguardError,
    VerifierConfig,
    solve_many,
)
from specguard.core.fallback import Fallback
from specguard.core.speculation import Lookahead
from specguard.models.tiny import problems
from tests.bigrams import bigram_engine

CHEAP, DEAR = DraftCost(0.15, verification=1.1), DraftCost(0.9, verification=4.0)
# Next to nothing passes, so that the target writes.
STRICT = VerifierConfig(
    weights={"log_prob_sum": 1.0}, bounds={"log_prob_sum": (-1.0, 0.0)}, threshold=0.999
)


@pytest.fixture(scope="module")
def pair() -> Solver:
    return specguard.load("tiny", backend="cpu", draft_cost=None)


def lookahead(cost: DraftCost | None, **settings: Any) -> Lookahead:
    return Lookahead(SolveConfig(draft_cost=cost, **settings))


def test_guesses_are_as_long_as_they_pay() -> None:
    assert lookahead(CHEAP).num_ahead > lookahead(DraftCost(0.4, verification=1.1)).num_ahead > 0
    assert lookahead(DEAR).num_ahead == 0
    assert lookahead(CHEAP).pace < 0.6 < lookahead(DEAR).pace == 1
    # Method sd guesses whatever it costs: it has nothing else to do.
    assert lookahead(DEAR, method="sd").num_ahead > 0
    # Nobody knows what a guess costs.
    assert lookahead(None).num_ahead == 0
    assert lookahead(None, method="sd").num_ahead == 4


def test_sampled_rewrites_are_guessed_where_somebody_asks() -> None:
    assert lookahead(CHEAP, rewrite_sampling=Sampling()).num_ahead == 0
    assert lookahead(CHEAP, rewrite_sampling=Sampling(), num_speculated=3).num_ahead == 3


def test_what_was_asked_for_is_done_whatever_it_costs() -> None:
    for cost in CHEAP, DEAR, None:
        assert lookahead(cost, num_speculated=3).num_ahead == 3
        assert lookahead(cost, num_speculated=0).num_ahead == 0
    assert Lookahead(SolveConfig(draft_cost=CHEAP), is_possible=False).num_ahead == 0


def test_guesses_grow_while_they_are_kept_and_cease_where_they_are_not() -> None:
    kept, rejected = lookahead(CHEAP), lookahead(CHEAP)
    first = kept.num_ahead
    for _ in range(80):
        kept.saw(8, 8, 9)
        rejected.saw(8, 0, 1)
    assert kept.num_ahead > first
    assert rejected.num_ahead == 0
    assert (rejected.pace, kept.pace < 0.4) == (1, True)


@pytest.mark.parametrize("is_confident", [False, True])
def test_guesses_that_did_not_pay_are_tried_again_ever_more_rarely(is_confident: bool) -> None:
    found = Lookahead(SolveConfig(draft_cost=CHEAP), is_confident=is_confident)
    first, pauses = found.num_ahead, []

    def fail_and_wait() -> None:
        for _ in range(9999):
            if found.num_ahead == 0:
                break
            found.saw(found.num_ahead, 0, 1)
        assert (found.num_ahead, found.pace) == (0, 1.0)
        pauses.append(0)
        while found.num_ahead == 0:
            found.rest()
            pauses[-1] += 1
        assert found.num_ahead == first

    for _ in range(7):
        fail_and_wait()
    assert pauses == [1, 2, 4, 8, 16, 32, 32]
    while found.pace > 0.3:
        found.saw(8, 8, 9)
    for _ in range(2):
        fail_and_wait()
    assert pauses[-2:] == [1, 2]


def test_drafting_has_to_be_faster_than_guessing() -> None:
    cost = DraftCost(0.5, verification=3.0)  # 0.6 of a target that writes token by token
    for pace, is_on in (1.0, False), (0.59, True):
        fallback = Fallback(cost)
        fallback.pace = pace
        assert fallback.is_on == is_on


@pytest.mark.parametrize("num_speculated", [1, 3, 8])
def test_guesses_change_no_greedy_rewrite(pair: Solver, num_speculated: int) -> None:
    config = replace(STRICT, threshold=0.999)
    num_kept = 0
    for problem in islice(problems.stream(problems.CALIBRATION), 4):
        plain, guessed = (
            pair.solve(problem.text, verifier=config, num_speculated=count)
            for count in (0, num_speculated)
        )
        assert [step.decision for step in plain.steps].count("rewritten") > 0
        assert [(step.decision, step.text) for step in guessed.steps] == [
            (step.decision, step.text) for step in plain.steps
        ]
        assert guessed.stats.num_target_tokens <= plain.stats.num_target_tokens
        num_kept += guessed.stats.num_kept_tokens
    assert num_kept > 0


def test_the_target_writes_by_guesses_while_drafting_pauses(pair: Solver) -> None:
    problem = next(problems.stream(problems.CALIBRATION)).text
    alone = pair.solve(problem, method="target")
    cost = DraftCost(0.3, verification=1.0, further=9.0)
    found = pair.solve(
        problem, draft_cost=cost, num_candidates=4, num_speculated=3, selector="ngram"
    )
    assert found.text == alone.text
    assert all(step.is_fallback for step in found.steps)
    assert found.stats.num_kept_tokens > 0


def test_guesses_that_cease_to_pay_leave_the_rest_to_the_target(
    monkeypatch: pytest.MonkeyPatch, pair: Solver
) -> None:
    rounds: list[int] = []

    def saw(own: Lookahead, num_judged: int, num_kept: int, num_written: int) -> None:
        rounds.append(num_kept)
        own._num_fixed = 0

    monkeypatch.setattr(Lookahead, "saw", saw)
    problem = next(problems.stream(problems.CALIBRATION)).text
    found = pair.solve(problem, method="sd", num_speculated=2)
    assert len(rounds) == 1
    assert found.stats.num_guessed_tokens == 2
    assert found.text == pair.solve(problem, method="target").text


def test_side_by_side_nothing_is_guessed_unless_somebody_asks(pair: Solver) -> None:
    texts = [problem.text for problem in islice(problems.stream(problems.CALIBRATION), 3)]
    settings: dict[str, Any] = {"verifier": STRICT, "draft_cost": CHEAP}
    alone = [pair.solve(text, **settings) for text in texts]
    assert sum(each.stats.num_guessed_tokens for each in alone) > 0
    for batch_size, more, guesses in (
        (1, {}, True),
        (3, {}, False),
        (3, {"num_speculated": 2}, True),
    ):
        outcomes = list(solve_many(pair, texts, batch_size=batch_size, **settings, **more))
        found = {each.index: each.solution for each in outcomes}
        assert [found[index].text for index in range(3)] == [each.text for each in alone]  # type: ignore[union-attr]
        counts = [each.stats.num_guessed_tokens for each in found.values() if each]
        assert (sum(counts) > 0) == guesses


def test_greedy_guesses_need_the_target_s_choices() -> None:
    draft, target = bigram_engine(2), bigram_engine(1)
    for engine in draft, target:
        engine.features = engine.features - {"choices"}
    config = SolveConfig(max_tokens=9, draft_cost=CHEAP)
    found = Solver(draft, target, config).solve("\x03\x02")
    assert found.stats.num_guessed_tokens == 0
    with pytest.raises(SpecguardError, match="has no choices"):
        Solver(draft, target, config).solve("\x03\x02", num_speculated=2)

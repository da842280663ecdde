"""What a rewrite keeps of rejected candidates: what the target would have written itself."""

from dataclasses import replace

import pytest

from specguard.core import Sampling, SolveConfig, Solver, UsageError, VerifierConfig
from tests.bigrams import bigram_engine
from tests.scripted import Scripted
from tests.test_loop import ANSWER, LOG_PROB, PROMPT, RIGHT, WRONG, run


def test_what_the_target_would_have_written_anyway_is_kept() -> None:
    draft = Scripted("d", [[WRONG, "wrung.\n\n"], [ANSWER] * 2])
    target = Scripted(
        "t", ["ap.\n\n"], logprobs={WRONG: -1.9, "wrung.\n\n": -1.9}, first_choices={WRONG: 2}
    )
    solution = run(
        draft, target, num_candidates=2, selector="target", verifier=LOG_PROB, detail=True
    )
    first = solution.steps[0]
    assert (first.text, first.decision) == ("wrap.\n\n", "rewritten")
    assert (first.num_reused, first.num_tokens) == (2, 7)
    assert solution.stats.num_target_tokens == 5
    [job] = target.generated
    assert target.prefix_of(job) == PROMPT + "wr"
    # The step is one step, as far as its delimiter and its cap go.
    assert job.boundary.begun == (ord("w"), ord("r"))
    assert job.boundary.max_tokens == SolveConfig().max_step_tokens - 2


def test_a_step_that_the_target_would_have_written_whole_is_not_written_again() -> None:
    target = Scripted("t", [], logprobs={WRONG: -1.9}, first_choices={WRONG: len(WRONG)})
    solution = run(Scripted("d", [WRONG, ANSWER]), target, verifier=LOG_PROB)
    assert solution.text == WRONG + ANSWER
    first = solution.steps[0]
    assert (first.author, first.decision, first.num_reused) == ("target", "rewritten", len(WRONG))
    assert target.generated == []


@pytest.mark.parametrize("change", ["sampled", "reference"])
def test_nothing_is_kept_of_a_step_where_that_would_not_be_plain(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"rewrite_sampling": Sampling(0.5, 0.9)} if change == "sampled" else {}
    if change == "reference":
        monkeypatch.setenv("SPECGUARD_REFERENCE", "1")
    target = Scripted("t", [RIGHT], logprobs={WRONG: -1.9}, first_choices={WRONG: 2})
    solution = run(Scripted("d", [WRONG, ANSWER]), target, verifier=LOG_PROB, **settings)
    assert solution.text == RIGHT + ANSWER
    assert solution.stats.num_reused_tokens == 0
    monkeypatch.setenv("SPECGUARD_REFERENCE", "yes")
    with pytest.raises(UsageError, match="must be 0 or 1"):
        run(Scripted("d", [WRONG]), Scripted("t", [RIGHT], {WRONG: -9}), verifier=LOG_PROB)


@pytest.mark.parametrize("selector", ["draft", "target"])
@pytest.mark.parametrize("num_candidates", [1, 4])
def test_it_is_the_same_rewrite_down_to_where_its_step_ends(
    selector: str, num_candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SolveConfig(
        num_candidates=num_candidates,
        sampling=Sampling(1.0, 0.9),
        selector=selector,
        verifier=replace(LOG_PROB, bounds={"log_prob": (-4.0, 0.0)}),
        delimiter="&",
        max_step_tokens=7,
        max_tokens=90,
    )
    # Alike enough that the draft often begins as the target would.
    solver = Solver(bigram_engine(1, 1), bigram_engine(1, 7), config)
    num_reused = 0
    for text in (f"problem {number}" for number in range(6)):
        monkeypatch.setenv("SPECGUARD_REFERENCE", "0")
        kept = solver.solve(text)
        monkeypatch.setenv("SPECGUARD_REFERENCE", "1")
        plain = solver.solve(text)
        assert [(s.text, s.decision) for s in kept.steps] == [
            (s.text, s.decision) for s in plain.steps
        ]
        assert all(0 <= step.num_reused <= step.num_tokens for step in kept.steps)
        assert plain.stats.num_reused_tokens == 0
        num_reused += kept.stats.num_reused_tokens
        assert kept.stats.num_target_tokens <= plain.stats.num_target_tokens
    assert num_reused > 0


def test_a_draft_that_verifies_has_the_target_write_from_the_start() -> None:
    verifier = VerifierConfig("draft", {"log_prob": 1.0}, bounds={"log_prob": (-2.0, 0.0)})
    target = Scripted("t", ["apped.\n\n"], first_choices={WRONG: 1})
    solution = run(Scripted("d", [WRONG, ANSWER], {WRONG: -1.9}), target, verifier=verifier)
    assert solution.steps[0].num_reused == 0
    assert target.prefix_of(target.generated[0]) == PROMPT

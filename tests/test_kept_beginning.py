"""What a rewrite keeps of rejected candidates.

From "start", what the target would have written itself; from "doubt", what comes before the token
that it doubts most.
"""

from dataclasses import replace

import pytest

from specguard.core import Sampling, SolveConfig, Solver, UsageError, VerifierConfig
from tests.bigrams import bigram_engine
from tests.scripted import Scripted
from tests.test_loop import ANSWER, LOG_PROB, PROMPT, RIGHT, WRONG, run

START = LOG_PROB
DOUBT = replace(LOG_PROB, rewrite_from="doubt")


def test_what_the_target_would_have_written_anyway_is_kept() -> None:
    draft = Scripted("d", [[WRONG, "wrung.\n\n"], [ANSWER] * 2])
    target = Scripted(
        "t", ["ap.\n\n"], logprobs={WRONG: -1.9, "wrung.\n\n": -1.9}, first_choices={WRONG: 2}
    )
    solution = run(draft, target, num_candidates=2, selector="target", verifier=START, detail=True)
    first = solution.steps[0]
    assert (first.text, first.decision) == ("wrap.\n\n", "rewritten")
    assert (first.num_reused, first.num_tokens) == (2, 7)
    assert solution.stats.num_target_tokens == 5
    [job] = target.generated
    assert target.prefix_of(job) == PROMPT + "wr"
    # The step is one step, as far as its delimiter and its cap go.
    assert job.boundary.begun == (ord("w"), ord("r"))
    assert job.boundary.max_tokens == SolveConfig().max_step_tokens - 2


@pytest.mark.parametrize("rewriting", [START, DOUBT])
def test_a_step_that_the_target_would_have_written_whole_is_not_written_again(
    rewriting: VerifierConfig,
) -> None:
    target = Scripted("t", [], logprobs={WRONG: -1.9}, first_choices={WRONG: len(WRONG)})
    solution = run(Scripted("d", [WRONG, ANSWER]), target, verifier=rewriting)
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
    solution = run(Scripted("d", [WRONG, ANSWER]), target, verifier=START, **settings)
    assert solution.text == RIGHT + ANSWER
    assert solution.stats.num_reused_tokens == 0
    monkeypatch.setenv("SPECGUARD_REFERENCE", "yes")
    with pytest.raises(UsageError, match="must be 0 or 1"):
        run(Scripted("d", [WRONG]), Scripted("t", [RIGHT], {WRONG: -9}), verifier=START)


@pytest.mark.parametrize("selector", ["draft", "target"])
@pytest.mark.parametrize("num_candidates", [1, 4])
def test_it_is_the_same_rewrite_down_to_where_its_step_ends(
    selector: str, num_candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SolveConfig(
        num_candidates=num_candidates,
        sampling=Sampling(1.0, 0.9),
        selector=selector,
        verifier=replace(START, bounds={"log_prob": (-4.0, 0.0)}),
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


def doubting(**changes: object) -> Scripted:
    """A target that would have written "w", and doubts the "o" of "wrong" most."""
    logprobs = [-0.1, -1.0, -1.9, -0.2, -0.2, -0.2, -0.1, -0.1]
    return Scripted("t", ["apped.\n\n"], {WRONG: logprobs}, first_choices={WRONG: 1}, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("rewrite", [Sampling(0.0, 1.0), Sampling(0.5, 0.9)])
@pytest.mark.parametrize("is_reference", ["0", "1"])
def test_the_target_goes_on_from_the_token_that_it_doubts_most(
    rewrite: Sampling, is_reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECGUARD_REFERENCE", is_reference)
    target = doubting()
    draft = Scripted("d", [WRONG, ANSWER])
    solution = run(draft, target, rewrite_sampling=rewrite, verifier=DOUBT)
    first = solution.steps[0]
    assert (first.text, first.decision, first.num_reused) == ("wrapped.\n\n", "rewritten", 2)
    assert first.draft_text == WRONG
    [job] = target.generated
    assert target.prefix_of(job) == PROMPT + "wr"
    assert job.boundary.begun == (ord("w"), ord("r"))
    assert solution.stats.num_target_tokens == len("apped.\n\n")


def test_of_several_candidates_the_selected_one_is_kept_up_to_the_doubt() -> None:
    draft = Scripted("d", [["zzz 9.\n\n", WRONG], [ANSWER] * 2])
    target = doubting(default_logprob=-1.95)
    solution = run(draft, target, num_candidates=2, selector="target", verifier=DOUBT)
    assert solution.steps[0].text == "wrapped.\n\n"


def test_a_draft_that_verifies_has_the_target_write_from_the_start() -> None:
    verifier = VerifierConfig(
        "draft", {"log_prob": 1.0}, bounds={"log_prob": (-2.0, 0.0)}, rewrite_from="doubt"
    )
    draft = Scripted("d", [WRONG, ANSWER], {WRONG: -1.9})
    target = doubting()
    solution = run(draft, target, verifier=verifier)
    assert solution.steps[0].num_reused == 0
    assert target.prefix_of(target.generated[0]) == PROMPT

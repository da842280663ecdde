"""What users of other speculative decoders complain of most: shown not to happen here."""

import json
from typing import Any

import pytest

import specguard
from specguard.core import GREEDY, Sampling, Solution, solve_many
from tests.conftest import TINY, make_checkpoint
from tests.test_cli import SHELLS, invoke

WINDOW = 8
TEXTS = ["Mia has 3 shells.", "Tom has 12 pens. Tom finds 5 more.", "Ada sells half of 8 shells."]
LENGTHS: dict[str, Any] = {"max_tokens": 5 * WINDOW, "max_step_tokens": 6}
VARIED = Sampling(1.5, 1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A draft with a padded vocabulary, a target whose layers see a few tokens back only."""
    draft, target = (tmp_path_factory.mktemp(role) for role in ("draft", "target"))
    make_checkpoint(draft, vocab_size=1088, num_hidden_layers=2, seed=1)
    make_checkpoint(target, "Mistral", sliding_window=WINDOW)
    return str(draft), str(target)


def load(folders: tuple[str, str], **changes: Any) -> specguard.Solver:
    draft, target = folders
    return specguard.load(draft=draft, target=target, backend="cpu", draft_cost=None, **changes)


def story(solution: Solution | None) -> list[tuple[str, str]]:
    assert solution is not None
    return [(step.decision, step.text) for step in solution.steps]


def test_slower_than_the_target_and_silent_about_it() -> None:
    result = invoke("solve", SHELLS, "--backend", "cpu", "--draft-cost", "2", "--json")
    solution = Solution.from_json(result.stdout)
    assert {step.author for step in solution.steps} == {"target"}
    assert solution.stats.num_drafted_tokens == 0
    said = invoke("solve", SHELLS, "--backend", "cpu", "--draft-cost", "2").stderr
    assert "steps without a draft, which did not pay" in said


def test_padded_vocabularies_are_refused(folders: tuple[str, str]) -> None:
    solver = load(folders)
    assert solver.draft is not None
    assert solver.target is not None
    assert solver.draft.tokenizer.vocabulary == solver.target.tokenizer.vocabulary
    greedy = solver.solve(TEXTS[0], method="target", sampling=GREEDY, **LENGTHS)
    assert solver.solve(TEXTS[0], method="sd", sampling=GREEDY, **LENGTHS).text == greedy.text


@pytest.mark.parametrize("method", ["specguard", "sd"])
def test_more_than_one_problem_at_a_time_is_refused(folders: tuple[str, str], method: str) -> None:
    solver = load(folders)
    settings = {**LENGTHS, "method": method, "sampling": VARIED}
    alone = [story(solver.solve(text, **settings)) for text in TEXTS]
    for outcome in solve_many(solver, TEXTS, batch_size=3, **settings):
        assert story(outcome.solution) == alone[outcome.index]


def test_a_cache_that_cannot_be_cut_ends_the_request(folders: tuple[str, str]) -> None:
    """Steps are rejected far beyond the window, and the text is the target's own all the same."""
    solver = load(folders)
    nothing_passes = specguard.VerifierConfig(
        weights={"log_prob": 1.0}, bounds={"log_prob": (-2.0, 0.0)}, threshold=1.0
    )
    alone = solver.solve(TEXTS[0], method="target", sampling=GREEDY, **LENGTHS)
    for speculated in 0, 3:
        guarded = solver.solve(
            TEXTS[0],
            verifier=nothing_passes,
            sampling=VARIED,
            num_candidates=3,
            selector="ngram",
            num_speculated=speculated,
            **LENGTHS,
        )
        assert {step.decision for step in guarded.steps} == {"rewritten"}
        assert guarded.text == alone.text
        assert sum(step.num_tokens for step in guarded.steps) > 4 * WINDOW


def test_no_word_of_how_many_steps_were_accepted() -> None:
    pair = "--draft", TINY / "draft", "--target", TINY / "target", "--backend", "cpu"
    result = invoke("solve", SHELLS, *pair, "--no-fallback")
    assert "accepted 4 of 4 drafted steps" in result.stderr
    stats = json.loads(invoke("solve", SHELLS, *pair, "--no-fallback", "--json").stdout)["stats"]
    assert stats["num_accepted_steps"] == stats["num_steps"] == 4

"""What becomes of a pair whose engines lack something, and of one whose tokens differ."""

from typing import Any

import pytest

from specguard.core import (
    ALL_FEATURES,
    Feature,
    Pair,
    Sampling,
    Solution,
    SolveConfig,
    Solver,
    SpecguardError,
    VerifierConfig,
)
from specguard.core.config import PAPER_CANDIDATES, PRESETS
from tests.scripted import CharTokenizer, Script, Scripted

WRONG, ANSWER = "wrong.\n\n", "So \\boxed{7}.\n\n"
LOG_PROB = VerifierConfig(weights={"log_prob": 1.0}, bounds={"log_prob": (-2.0, 0.0)})
PAPER = VerifierConfig(**PRESETS["paper"])


def without(*lacking: Feature, name: str = "bare", script: Script | None = None) -> Scripted:
    features = ALL_FEATURES - {"distributions", "choices", *lacking}
    reasons = {feature: f"no {feature} here" for feature in lacking}
    return Scripted(
        name, script or [WRONG, ANSWER], {WRONG: -9}, features=features, reasons=reasons
    )


BARE: tuple[Feature, ...] = ("attention", "hidden states", "entropy", "exact randomness")
SETTINGS: list[dict[str, Any]] = [
    {"method": "target"},
    {"method": "draft"},
    {"selector": "ngram", "verifier": LOG_PROB, "num_candidates": 4},
    {},
    {
        "selector": "numbers",
        "verifier": LOG_PROB,
        "num_candidates": 4,
        "num_first_candidates": 2,
    },
    {"selector": "target", "num_candidates": 4},
    {"selector": "draft", "verifier": LOG_PROB, "num_candidates": 1},
    {"selector": "ngram", "verifier": VerifierConfig("draft", {"log_prob": 1.0})},
    {"selector": "ngram", "verifier": VerifierConfig(weights={"consistency": 1.0})},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(map(str, settings)))
@pytest.mark.parametrize("detail", [False, True])
def test_bare_engines_are_asked_for_nothing_that_they_lack(
    settings: dict[str, Any], detail: bool
) -> None:
    """A scripted engine raises where a job asks it for a feature that it has not."""
    draft, target = without(*BARE, name="d"), without(*BARE, name="t", script=[ANSWER])
    solution = Solver(draft, target, SolveConfig(**settings)).solve("p", detail=detail)
    assert solution.answer == "7"
    assert not any(name.startswith("entropy") for step in solution.steps for name in step.signals)
    assert Solution.from_json(solution.to_json()) == solution


@pytest.mark.parametrize("lacking", BARE)
@pytest.mark.parametrize("role", ["draft", "target"])
def test_settings_that_nobody_chose_become_what_the_engines_can(
    lacking: Feature, role: str
) -> None:
    engines = {"draft": without(name="d"), "target": without(name="t", script=[ANSWER])}
    engines[role].features -= {lacking}
    paper = SolveConfig(verifier=PAPER, **PAPER_CANDIDATES)
    config, notes = Pair(**engines).degraded(paper)  # type: ignore[arg-type]
    assert Solver(**engines, config=config).solve("p", detail=True).answer == "7"  # type: ignore[arg-type]
    changed = (role, lacking) in {("draft", "hidden states"), ("target", "attention")}
    assert bool(notes) == changed
    assert (config == paper) == (not changed)


def test_without_hidden_states_candidates_are_compared_by_their_words() -> None:
    draft = without("hidden states", name="d")
    config, [note] = Pair(draft, without()).degraded(SolveConfig(**PAPER_CANDIDATES))
    assert config.selector == "ngram"
    assert "compared by their words" in note
    assert "d has no hidden states (no hidden states here)" in note


def test_only_what_somebody_chose_stays_as_it_is() -> None:
    """So a threshold of one's own leaves the signals to what the engines can do."""
    pair = Pair(without("hidden states", name="d"), without("attention", name="t"))
    paper = SolveConfig(verifier=PAPER, **PAPER_CANDIDATES)
    usual = {"log_prob": 1.0}, "ngram"
    kept = PAPER.weights, paper.selector
    for chosen, weights, selector in (
        (set(), *usual),
        ({"threshold", "seed"}, *usual),
        ({"weights"}, kept[0], usual[1]),
        ({"selector"}, usual[0], kept[1]),
        ({"weights", "selector"}, *kept),
    ):
        config, notes = pair.degraded(paper, chosen)
        assert (config.verifier.weights, config.selector) == (weights, selector)
        assert len(notes) == 2 - len(chosen & {"weights", "selector"})


def test_a_selector_that_needs_hidden_states_is_refused_where_it_was_chosen() -> None:
    draft = without("hidden states", name="d")
    for solver, changes in (
        (Solver(draft, without(), SolveConfig(selector="draft", num_candidates=4)), {}),
        (Solver(draft, without()), {"selector": "draft", "num_candidates": 4}),
        (
            Solver(draft, without(), reward=Unasked()),
            {"method": "rsd", "selector": "draft", "num_candidates": 4},
        ),
    ):
        with pytest.raises(
            SpecguardError, match=r"d has no hidden states \(no .* here\)"
        ) as caught:
            solver.solve("p", **changes)
        assert "--selector ngram" in caught.value.hint
    assert draft.jobs == []
    # Of the target, hidden states are never needed.
    Solver(without(), without("hidden states")).solve("p", selector="draft", num_candidates=4)


class Unasked:
    """A reward model that is not to be asked."""

    name = "unasked"

    async def rewards(self, *arguments: object) -> list[float]:
        raise AssertionError

    def release(self, key: object) -> None:
        raise AssertionError


def test_without_attention_the_log_probability_verifies_alone() -> None:
    target = without("attention", name="t")
    paper = SolveConfig(verifier=PAPER)
    config, [note] = Pair(without(), target).degraded(paper)
    assert config.verifier.weights == {"log_prob": 1.0}
    assert "by log-probability alone: t has no attention (no attention here)" in note
    assert Solver(without(), target, config).solve("p").answer == "7"
    assert [job.capture for job in target.scored] == [None, None]
    # The draft's attention is of no use while the target verifies.
    assert Pair(without("attention"), without()).degraded(paper) == (paper, [])


@pytest.mark.parametrize("role", ["draft", "target"])
def test_a_verifier_that_weighs_grounding_is_refused_with_the_reason(role: str) -> None:
    engines = {"draft": without(name="d"), "target": without(name="t")}
    engines[role] = without("attention", name="soft")
    verifier = VerifierConfig(**{**PRESETS["paper"], "model": role})
    solver = Solver(**engines, config=SolveConfig(verifier=verifier))  # type: ignore[arg-type]
    with pytest.raises(
        SpecguardError,
        match=r"soft has no attention \(no attention here\); the verifier weighs grounding",
    ) as caught:
        solver.solve("p")
    assert "--beta 1" in caught.value.hint
    with pytest.raises(SpecguardError, match="soft has no attention"):
        Solver(**engines).solve("p", verifier=verifier)  # type: ignore[arg-type]
    assert engines["draft"].jobs == engines["target"].jobs == []
    # Nothing verifies where one engine writes alone.
    assert solver.solve("p", method=role).steps


def test_a_verifier_that_weighs_entropy_needs_it() -> None:
    verifier = VerifierConfig(weights={"entropy_mean": 1.0})
    solver = Solver(without(), without("entropy", name="t"), SolveConfig(verifier=verifier))
    with pytest.raises(SpecguardError, match="t has no entropy"):
        solver.solve("p")


def test_greedy_speculation_needs_the_target_s_choices() -> None:
    whole = Scripted("whole", [ANSWER], features=ALL_FEATURES)
    with pytest.raises(SpecguardError, match="b has no choices; token-level"):
        Solver(whole, without(name="b")).solve("p", method="sd")
    Pair(without(), whole).engines_for(SolveConfig("sd"))


def test_sampled_speculation_needs_the_distributions_of_both() -> None:
    whole = Scripted("whole", [ANSWER], features=ALL_FEATURES)
    for draft, target in (without(name="b"), whole), (whole, without(name="b")):
        with pytest.raises(SpecguardError, match="b has no distributions; token-level"):
            Solver(draft, target).solve("p", method="sd", sampling=Sampling())
    Pair(whole, whole).engines_for(SolveConfig("sd"))


def test_a_solution_says_whether_other_engines_would_draw_the_same() -> None:
    exact, own = without(), without("exact randomness")
    assert Solver(exact, exact).solve("p").is_reproducible
    for draft, target in (exact, own), (own, exact):
        solver = Solver(draft, target)
        assert not solver.solve("p").is_reproducible
        assert '"is_reproducible": false' in solver.solve("p").to_json()
    # An engine that takes no part does not count; the seed is passed on to one that does.
    assert Solver(own, exact).solve("p", method="target").is_reproducible
    assert len({job.seed for job in own.generated}) > 1


def test_models_with_other_tokens_are_refused_by_name() -> None:
    other = Scripted("t", [], tokenizer=CharTokenizer(shift=1))
    with pytest.raises(SpecguardError, match=r"'\\x01' is 1 in the draft and 2 in the target"):
        Solver(Scripted("d", []), other)
    short = CharTokenizer()
    del short.vocabulary["z"]
    with pytest.raises(SpecguardError, match="'z' is 122 in the target and missing in the draft"):
        Solver(Scripted("d", [], tokenizer=short), Scripted("t", []))
    with pytest.raises(SpecguardError, match=r"draft d and target t .*: 'z' is 122 in the draft"):
        Solver(Scripted("d", []), Scripted("t", [], tokenizer=short))


def test_tokens_count_and_not_how_many_ids_there_are() -> None:
    """Padded embedding rows have no token: the vocabularies are equal, in whatever order."""
    shuffled = CharTokenizer()
    shuffled.vocabulary = dict(reversed(shuffled.vocabulary.items()))
    pair = Solver(without(), Scripted("t", [ANSWER], tokenizer=shuffled))
    assert pair.solve("p").answer == "7"

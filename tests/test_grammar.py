"""What the built-in pair says that it knows: its problems are read, anything else is refused."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import specguard
from recipes.tiny.short import draw, measure
from specguard import UsageError
from specguard.models.tiny import grammar, language, problems
from specguard.models.tiny.arithmetic import MAX_COUNT
from tests.conftest import PROBLEM, TINY
from tests.test_cli import invoke

END = "How many shells does Mia have?"


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([problems.TRAINING, problems.CALIBRATION, problems.HELD_OUT]),
    st.integers(0, 10**6),
)
def test_what_is_generated_is_read_as_it_was_meant(stream: int, index: int) -> None:
    problem = problems.generate(stream, index)
    reading = grammar.read(problem.text, most=MAX_COUNT)
    assert reading.things == problem.things
    assert reading.question == problem.question
    assert problem.question.answer(reading.counts) == problem.answer
    for read, meant in zip(reading.sentences, problem.sentences, strict=True):
        assert (read.text, read.updates, read.facts) == (meant.text, meant.updates, meant.facts)


OUTSIDE = [
    ("Mia has 2.5 shells. Mia finds 1.5 more shells. " + END, '100, not "2.5"'),
    ("-5 + 3", 'not "-5"'),
    ("17*23", 'not "17*23"'),
    ("Mia has 0 shells. " + END, 'not "0"'),
    ("Mia has 12345 shells. " + END, 'not "12345"'),
    ("Mia has 007 shells. " + END, 'not "007"'),
    ("Mia has 1,000 shells. " + END, 'not "1,000"'),
    ("Mia has \u0662\u0663 shells. " + END, 'not "\u0662\u0663"'),
    ("What is the integral of x?", 'the word "integral"'),
    ("Was ist die Summe?", 'the word "Was"'),
    ("\u7c73\u5a05\u6709\u4e94\u4e2a", 'the word "\u7c73'),
    ("Mia has five shells. " + END, 'the word "five"'),
    ("mia has 5 shells. " + END, 'the word "mia"'),
    ("Mia has 24 pearls. How many pearls does Mia have?", 'the word "pearls"'),
    (".", 'the word "."'),
    ("Mia has 24 shells.\nMia finds 9 shells. " + END, "more than a blank"),
    # All of these words are known. What the pair makes of them is wrong.
    ("Mia has 24 shells. Mia gives half of the shells to Tom. " + END, "no sentence like"),
    ("Mia has 24 shells. Mia sells 9 shells. " + END, "no sentence like"),
    ("Mia has 24 shells. Mia buys 9 apples. " + END, "not shells and apples"),
    ("Mia has 24 shells. Mia gives 9 shells to Tom. " + END, "what Tom has at first"),
    ("Mia has 24 shells. Tom has 9 shells. Tom has 3 more shells than Mia. " + END, "twice"),
    ("Mia has 24 shells. Mia finds 9 shells. Tom has 3 shells. " + END, "before anything"),
    ("Mia has 24 shells. Mia finds 9 shells. Mia finds 8 shells. " + END, 'with "Mia finds"'),
    ("Mia has 24 shells. Mia loses 30 shells. " + END, "that it can work out"),
    ("Mia has 101 shells. " + END, 'not "101"'),
    ("Mia has 80 shells. Mia finds 21 shells. " + END, "comes to more than 100"),
    ("Mia has 25 shells. Mia loses half of the shells. " + END, "that it can work out"),
    ("Mia has 24 shells. Mia multiplies the shells by 12. " + END, "that it can work out"),
    ("Mia has 24 shells. Mia hands Mia 3 shells. " + END, "that it can work out"),
    ("Mia has 2 shells. How many shells does Tom have?", "what Tom has at first"),
    ("Mia has 24 shells. How many more shells does Mia have than Mia?", "no answer"),
    ("Mia has 24 dollars. What do the dollars of Mia cost at 3 dollars each?", "no answer"),
    ("Mia has 24 shells. What do the shells of Mia cost at 12 dollars each?", "no answer"),
    ("Mia has 24 shells.", "no question like"),
    (
        "Mia has 3 shells. Tom has 4 shells. Amy has 5 shells. Ben has 6 shells. " + END,
        "more than 3 people",
    ),
]


@pytest.mark.parametrize(("problem", "reason"), OUTSIDE)
def test_what_is_outside_is_named(problem: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        grammar.check(problem)
    assert reason in caught.value.message
    assert len(caught.value.message) < 160
    assert "specguard models" in caught.value.hint


@settings(max_examples=300, deadline=None)
@given(st.text() | st.lists(st.sampled_from(PROBLEM.split())).map(" ".join))
def test_any_other_text_is_refused_in_one_line(text: str) -> None:
    """A shuffled problem may be one, with a fact and a question; nothing else is."""
    is_short = re.fullmatch(r"\s*Mia has 24 shells\. (.+\. )?How .*\?\s*", text) is not None
    if not is_short:
        with pytest.raises(UsageError) as caught:
            grammar.check(text)
        assert len(caught.value.message.splitlines()) == 1


def test_eight_events_are_too_many() -> None:
    sentences = [f"{link} Mia finds 3 shells." for link in language.language(1).links[:8]]
    with pytest.raises(UsageError, match="more than 7 things happen"):
        grammar.check(f"Mia has 24 shells. {' '.join(sentences)} {END}")
    grammar.check(f"Mia has 24 shells. {' '.join(sentences[:7])} {END}")


@pytest.mark.slow
def test_the_pair_solves_what_it_says_that_it_knows() -> None:
    """Every phrasing alone: one that is not understood would fail more than a few of its five."""
    rng = np.random.default_rng(1)
    forms = [form for form in grammar.event_forms() for _ in range(5)]
    short = [problem for form in forms if (problem := draw(rng, [form], 50)) is not None]
    assert len(short) == len(forms)
    outcomes = measure(specguard.load("tiny", backend="cpu", draft_cost=None), short)
    assert np.mean(outcomes) > 0.95
    for form in set(forms):
        right = [
            is_right
            for problem, is_right in zip(short, outcomes, strict=True)
            if problem.templates == (form.template,)
        ]
        assert sum(right) >= 3, form.template


def test_solve_refuses_what_the_pair_does_not_know() -> None:
    result = invoke("solve", "What is 17 * 23?")
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 2
    assert "the built-in pair cannot solve this" in result.stderr
    assert "--force" in result.stderr
    forced = invoke("solve", "What is 17 * 23?", "--force", "--json", "--max-tokens", "5")
    assert json.loads(forced.stdout)["stats"]["num_tokens"] <= 5


def test_other_models_are_asked_anything() -> None:
    models = ["--draft", str(TINY / "draft"), "--target", str(TINY / "target")]
    result = invoke("solve", "17*23", *models, "--json", "--max-tokens", "5")
    assert json.loads(result.stdout)["stats"]["num_tokens"] <= 5
    refused = invoke("solve", "17*23", *models, "--force")
    assert refused.exit_code == 2
    assert "--force has no meaning" in refused.stderr

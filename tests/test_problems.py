"""The generator of the built-in pair's problems: what it promises about every problem."""

import re
from itertools import islice, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.tiny.reading import evaluate
from specguard.models.tiny import language, problems
from specguard.models.tiny.arithmetic import MAX_COUNT, Update, sum_work
from specguard.models.tiny.problems import CALIBRATION, HELD_OUT, TRAINING, Problem

streams = st.sampled_from([TRAINING, CALIBRATION, HELD_OUT])
indices = st.integers(0, 10**6)
fast = settings(max_examples=60, deadline=None)


def words_of(problem: Problem) -> set[str]:
    return set(re.findall(r"[A-Za-z]+", problem.text))


@fast
@given(streams, indices)
def test_a_seed_reproduces(stream: int, index: int) -> None:
    assert problems.generate(stream, index) == problems.generate(stream, index)


@fast
@given(streams, indices)
def test_the_shape_of_a_problem(stream: int, index: int) -> None:
    problem = problems.generate(stream, index)
    events = [sentence for sentence in problem.sentences if sentence.updates]
    actors = {update.owner for event in events for update in event.updates}
    assert 2 <= len(events) <= 7
    assert 1 <= len(actors | {name for s in problem.sentences for name, _ in s.facts}) <= 3
    assert len(problem.steps) == len(problem.sentences) + 1
    assert problem.steps[-1].endswith(f"\\boxed{{{problem.answer}}}.")
    assert all("\n" not in step for step in problem.steps)
    assert problem.solution.split(problems.DELIMITER) == list(problem.steps)
    assert 1 <= problem.answer <= 3 * MAX_COUNT
    assert problem.text == " ".join([*(s.text for s in problem.sentences), problem.question.text])


@fast
@given(indices)
def test_no_two_sentences_begin_alike(index: int) -> None:
    problem = problems.generate(HELD_OUT, index)
    openings = [" ".join(sentence.text.split()[:2]) for sentence in problem.sentences]
    assert len(set(openings)) == len(openings)


def test_the_three_sets_share_no_words_and_no_problems() -> None:
    uses = [language.language(stream) for stream in (TRAINING, CALIBRATION, HELD_OUT)]
    for kind in ("names", "things"):
        lists = [set(getattr(use, kind)) for use in uses]
        assert sum(map(len, lists)) == len(set.union(*lists))
        assert all(lists)
    texts = [
        {problem.text for problem in islice(problems.stream(stream), 200)}
        for stream in (TRAINING, CALIBRATION, HELD_OUT)
    ]
    assert len(set.union(*texts)) == 600


def test_held_out_names_stay_out_of_training() -> None:
    held_out = language.language(HELD_OUT)
    kept = {*held_out.names, *held_out.things}
    for problem in islice(problems.stream(TRAINING), 300):
        assert not kept & words_of(problem)


def successions(problem: Problem) -> list[bool]:
    templates = [sentence.template for sentence in problem.sentences if sentence.updates]
    return [language.is_held_out(*pair) for pair in pairwise(templates)]


def test_some_successions_of_phrasings_are_held_out() -> None:
    assert not any(any(successions(p)) for p in islice(problems.stream(TRAINING), 300))
    assert all(any(successions(p)) for p in islice(problems.stream(HELD_OUT), 100))


def test_the_problems_are_varied() -> None:
    sample = list(islice(problems.stream(HELD_OUT), 1000))
    kinds = {sentence.kind for problem in sample for sentence in problem.sentences}
    assert len(kinds - {"fact", "distractor"}) >= 15
    assert {problem.question.kind for problem in sample} == {"have", "total", "difference", "worth"}
    lengths = {len(str(problem.answer)) for problem in sample}
    assert lengths >= {1, 2, 3, 4}
    per_kind = language.language(HELD_OUT).phrasings
    assert all(len(phrasings) >= 2 for phrasings in per_kind.values())


@fast
@given(st.integers(2, 9999), st.sampled_from("+-"), st.integers(2, 9999))
def test_the_work_of_a_sum_is_true(first: int, sign: str, second: int) -> None:
    first += second if sign == "-" else 0
    parts = sum_work(first, sign, second).split(" = ")
    assert {evaluate(part) for part in parts} == {first + second if sign == "+" else first - second}
    # One digit of the second number is dealt with at a time: what is left has but one.
    assert len(str(int(parts[-1].split()[-1])).rstrip("0")) == 1


@fast
@given(st.integers(2, 999), st.sampled_from("+-*/%"), st.integers(2, 9))
def test_work_comes_to_the_result(before: int, operator: str, operand: int) -> None:
    update = Update("A", "A", operator, (operand,))
    if update.fits(before):
        result = update.apply(before)
        last = update.work(before).split(" = ")[-1]
        assert str(result) == last.split()[-1] if operator == "%" else evaluate(last) == result


def test_a_simpler_problem_is_simpler() -> None:
    easy = problems.Difficulty(max_actors=1, max_events=2, max_distractors=0)
    for index in range(30):
        problem = problems.generate(TRAINING, index, easy)
        assert sum(bool(sentence.updates) for sentence in problem.sentences) == 2
        assert len({update.owner for s in problem.sentences for update in s.updates}) == 1
        assert not any(sentence.kind == "distractor" for sentence in problem.sentences)

"""The step checker: right steps pass whatever their wording, each kind of error is named."""

import itertools

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from recipes.tiny.checker import ErrorKind, judge
from recipes.tiny.reading import evaluate, read
from specguard.models.tiny import problems
from specguard.models.tiny.arithmetic import Update
from specguard.models.tiny.problems import Problem, Question, Sentence

fast = settings(max_examples=80, deadline=None)
streams = st.sampled_from([problems.TRAINING, problems.CALIBRATION, problems.HELD_OUT])
indices = st.integers(0, 10**6)

MIA = Problem(
    "Mia has 24 shells. Tom has 10 shells. Mia sells half of the shells. Then Mia finds 9 more "
    "shells. Tom gives 3 shells to Mia. How many shells does Mia have?",
    (),
    24,
    "shells",
    (
        Sentence("Mia has 24 shells.", "fact", "", facts=(("Mia", 24),)),
        Sentence("Tom has 10 shells.", "fact", "", facts=(("Tom", 10),)),
        Sentence("Mia sells half of the shells.", "half", "", (Update("Mia", "Mia", "/", (2,)),)),
        Sentence("Then Mia finds 9 more shells.", "gain", "", (Update("Mia", "Mia", "+", (9,)),)),
        Sentence(
            "Tom gives 3 shells to Mia.",
            "give",
            "",
            (Update("Tom", "Tom", "-", (3,)), Update("Mia", "Mia", "+", (3,))),
        ),
    ),
    Question("How many shells does Mia have?", "have", ("Mia",)),
)
HALF = "Mia sells half of the shells. Mia had 24 / 2, so Mia has 12 shells."
FIND = "Then Mia finds 9 more shells. Mia had 12 + 9, so Mia has 21 shells."
GIVE = (
    "Tom gives 3 shells to Mia. Tom had 10 - 3, so Tom has 7 shells, Mia had 21 + 3, so Mia has "
    "24 shells."
)


@fast
@given(streams, indices)
def test_reference_steps_are_right(stream: int, index: int) -> None:
    problem = problems.generate(stream, index)
    for number, step in enumerate(problem.steps):
        judgement = judge(problem, problem.steps[:number], step)
        assert judgement.is_right, (step, judgement)


@pytest.mark.parametrize(
    ("before", "step"),
    [
        ([], "Mia has 24 shells."),
        ([], "She sells half: 24 / 2 = 12."),
        ([], "Half of 24 is 12, so Mia now has 12 shells."),
        ([], "Mia had 24 shells. 24 ÷ 2 = 12 shells are left for Mia."),
        ([], "24 / 2 = 12 and 12 + 9 = 21, so Mia has 21 shells."),
        ([HALF], "Mia has 12 + 9 = 21 shells."),
        ([HALF], "9 + 12 = 21, so now Mia owns 21."),
        ([HALF, FIND], "Mia has 21 + 3 = 24 shells and Tom has 10 - 3 = 7 shells."),
        ([HALF, FIND, GIVE], "The answer is \\boxed{24}."),
        ([HALF, FIND, GIVE], "Mia has 24 shells. \\boxed{24}"),
        # A step that goes on correctly from a wrong number is right.
        ([HALF.replace("12", "13")], "Mia had 13 + 9, so Mia has 22 shells."),
    ],
)
def test_wording_does_not_matter(before: list[str], step: str) -> None:
    judgement = judge(MIA, before, step)
    assert judgement.is_right, judgement


@pytest.mark.parametrize(
    ("before", "step", "kind"),
    [
        ([], "Mia had 10 / 2, so Mia has 5 shells.", ErrorKind.ANOTHERS_NUMBER),
        ([], "Mia had 26 / 2, so Mia has 13 shells.", ErrorKind.INVENTED_NUMBER),
        ([], "Mia had 24 / 2, so Mia has 13 shells.", ErrorKind.ARITHMETIC_SLIP),
        ([], "24 / 2 = 11, so Mia has 12 shells.", ErrorKind.ARITHMETIC_SLIP),
        ([], FIND.replace("12", "24").replace("21", "33"), ErrorKind.SKIPPED_EVENT),
        ([], "Mia had 24 + 9, so Mia has 33 shells.", ErrorKind.SKIPPED_EVENT),
        ([HALF], FIND.replace("12", "24").replace("21", "33"), ErrorKind.SKIPPED_EVENT),
        ([HALF], HALF, ErrorKind.OTHER),
        ([HALF], "Then Mia finds 9 more shells.", ErrorKind.OTHER),
        ([HALF], "Mia had 12 - 9, so Mia has 3 shells.", ErrorKind.OTHER),
        ([HALF, FIND], GIVE.replace("10", "12").replace("7", "9"), ErrorKind.ANOTHERS_NUMBER),
        ([HALF, FIND], "Mia had 21 + 3, so Mia has 24 shells.", ErrorKind.OTHER),
        ([HALF, FIND], "The answer is \\boxed{21}.", ErrorKind.SKIPPED_EVENT),
        ([HALF, FIND, GIVE], "The answer is \\boxed{7}.", ErrorKind.ANOTHERS_NUMBER),
        ([HALF, FIND, GIVE], "The answer is \\boxed{95}.", ErrorKind.INVENTED_NUMBER),
        ([HALF, FIND, GIVE], "The answer is \\boxed{21}.", ErrorKind.OTHER),
        ([HALF, FIND, GIVE], "Mia has 25 shells.", ErrorKind.OTHER),
        ([], "", ErrorKind.OTHER),
        ([], "Mia now the shells.", ErrorKind.OTHER),
    ],
)
def test_errors_are_named(before: list[str], step: str, kind: ErrorKind) -> None:
    judgement = judge(MIA, before, step)
    assert judgement.kind is kind, judgement
    assert judgement.reason


def single_event(problem: Problem, draw: int) -> tuple[int, Update, dict[str, int]]:
    """A step with one plain sum or difference: its number, its update and the counts before it."""
    counts = {name: n for sentence in problem.sentences for name, n in sentence.facts}
    found = []
    for number, sentence in enumerate(problem.sentences):
        updates = sentence.updates
        if len(updates) == 1 and updates[0].operator in "+-" and len(updates[0].operands) == 1:
            found.append((number, updates[0], dict(counts)))
        for update in updates:
            counts[update.owner] = update.apply(counts[update.source])
    assume(found)
    return found[draw % len(found)]


def written(problem: Problem, number: int, update: Update, before: int, things: str) -> str:
    sentence = problem.sentences[number].text
    return (
        f"{sentence} {update.source} had {update.work(before)}, "
        f"so {update.owner} has {update.apply(before)} {things}."
    )


@fast
@given(indices, st.integers(0, 9), st.sampled_from([-10, -1, 1, 10]))
def test_a_slip_is_found(index: int, draw: int, slip: int) -> None:
    problem = problems.generate(problems.HELD_OUT, index)
    number, update, counts = single_event(problem, draw)
    result = update.apply(counts[update.source])
    step = problem.steps[number].replace(f"has {result} ", f"has {result + slip} ")
    assume(result + slip > 0 and step != problem.steps[number])
    assume(f"has {result + slip} " not in problem.sentences[number].text)
    judgement = judge(problem, problem.steps[:number], step)
    assert judgement.kind is ErrorKind.ARITHMETIC_SLIP, (step, judgement)


@fast
@given(indices, st.integers(0, 9))
def test_another_actors_number_is_found(index: int, draw: int) -> None:
    problem = problems.generate(problems.HELD_OUT, index)
    number, update, counts = single_event(problem, draw)
    others = [n for n in counts.values() if n != counts[update.source] and update.fits(n)]
    assume(others and others[0] not in update.operands)
    step = written(problem, number, update, others[0], problem.things)
    judgement = judge(problem, problem.steps[:number], step)
    assert judgement.kind in (ErrorKind.ANOTHERS_NUMBER, ErrorKind.SKIPPED_EVENT), (step, judgement)


@fast
@given(indices, st.integers(0, 9))
def test_an_invented_number_is_found(index: int, draw: int) -> None:
    problem = problems.generate(problems.HELD_OUT, index)
    number, update, counts = single_event(problem, draw)
    invented = Update(update.owner, update.source, "+", (9731,))
    step = written(problem, number, invented, counts[update.source], problem.things)
    assume("9731" not in problem.text + problem.solution)
    judgement = judge(problem, problem.steps[:number], step)
    assert judgement.kind is ErrorKind.INVENTED_NUMBER, (step, judgement)


@fast
@given(streams, indices)
@example(3, 463)
def test_a_skipped_event_is_found(stream: int, index: int) -> None:
    """Unless the step's own result happens to be the skipped one's: it may then state both."""
    problem = problems.generate(stream, index)
    events = [i for i, sentence in enumerate(problem.sentences) if sentence.updates]
    counts = {name: n for sentence in problem.sentences for name, n in sentence.facts}
    results = {}
    for number in events:
        for update in problem.sentences[number].updates:
            if update.source in counts:
                counts[update.owner] = update.apply(counts[update.source])
        owners = {update.owner for update in problem.sentences[number].updates}
        results[number] = {counts.get(owner) for owner in owners}
    for first, second in itertools.pairwise(events):
        updates = problem.sentences[second].updates
        if results[first] & results[second]:
            continue
        judgement = judge(problem, problem.steps[:first], problem.steps[second])
        assert not judgement.is_right
        introduced = {update.owner for update in problem.sentences[first].updates}
        if not introduced & {update.source for update in updates}:
            assert judgement.kind is ErrorKind.SKIPPED_EVENT, judgement


def test_expressions_and_statements_are_read() -> None:
    assert evaluate("12 + 3 * 8 - 6 / 2") == 33
    assert evaluate("7 / 2") is None
    assert evaluate("7 / 0") is None
    reading = read(
        "Tom has 5 more than Mia. Mia had 1,200 + 5 = 1205, so Tom now has 1205.", ["Tom", "Mia"]
    )
    assert reading.has == {"Tom": 1205}
    assert reading.had == {"Mia": 1200}
    assert [calculation.is_true for calculation in reading.calculations] == [True]
    assert read("so \\boxed{1,024}.", []).boxed == 1024

"""Whether a step of a solution is right given the steps before it, and what is wrong with it.

Judges what a step says about the counts, not how it says it. The steps before it are taken at
their word: a step that goes on correctly from a wrong number is right.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod

from recipes.tiny.reading import Reading, numbers_in, read
from specguard.models.tiny.arithmetic import Update
from specguard.models.tiny.problems import Problem, Sentence


class ErrorKind(StrEnum):
    """What is wrong with a step."""

    ANOTHERS_NUMBER = "another actor's number"
    INVENTED_NUMBER = "an invented number"
    ARITHMETIC_SLIP = "an arithmetic slip"
    SKIPPED_EVENT = "a skipped event"
    OTHER = "something else"


@dataclass(frozen=True, slots=True)
class Judgement:
    """``kind`` and ``reason`` say what is wrong, where something is."""

    kind: ErrorKind | None = None
    reason: str = ""

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong."""
        return self.kind is None


@dataclass(slots=True)
class _State:
    """Counts as the steps so far state them, numbers seen, and how many events they covered."""

    problem: Problem
    events: tuple[Sentence, ...]
    counts: dict[str, int]
    past: dict[str, set[int]]
    position: int = 0

    @classmethod
    def begin(cls, problem: Problem) -> "_State":
        facts = [fact for sentence in problem.sentences for fact in sentence.facts]
        events = tuple(sentence for sentence in problem.sentences if sentence.updates)
        counts = dict(facts)
        return cls(problem, events, counts, {actor: {n} for actor, n in facts})

    def after(self, event: Sentence) -> dict[str, int]:
        """All counts after an event; owners whose source has no count are left out."""
        counts = dict(self.counts)
        for update in event.updates:
            if update.source in counts:
                counts[update.owner] = update.apply(counts[update.source])
        return counts

    def restated(self, step: str) -> Sentence | None:
        """The event or distractor that the step repeats word for word."""
        found = [s for s in self.problem.sentences if s.text in step and not s.facts]
        return min(found, key=lambda s: (step.index(s.text), -len(s.text)), default=None)

    def read(self, step: str) -> Reading:
        """What the step states beside the sentence that it repeats."""
        sentence = self.restated(step)
        for text in (self.problem.question.text, sentence.text if sentence else ""):
            if text and text in step:
                step = step.replace(text, " ", 1)
                break
        return read(step, self._actors())

    def _actors(self) -> Iterable[str]:
        owners = [update.owner for event in self.events for update in event.updates]
        return dict.fromkeys((*self.counts, *owners))

    def claims(self, step: str, reading: Reading) -> dict[str, int]:
        """Counts that the step states; a result without an owner is that of the event's one."""
        if reading.has or reading.last_value is None or self.position == len(self.events):
            return reading.has
        event = self.restated(step)
        if event is None or not event.updates:
            event = self.events[self.position]
        owners = {update.owner for update in event.updates}
        return {owners.pop(): reading.last_value} if len(owners) == 1 else {}

    def take(self, step: str) -> None:
        """Believe a step."""
        sentence, reading = self.restated(step), self.read(step)
        claims = self.claims(step, reading)
        if sentence is not None and sentence.updates:
            self.position = max(self.position, self.events.index(sentence) + 1)
        else:
            self.position += self.covered(reading, claims)
        self.counts.update(claims)
        for actor, count in claims.items():
            self.past.setdefault(actor, set()).add(count)

    def covered(self, reading: Reading, claims: dict[str, int]) -> int:
        """How many of the next events a step works out, results stated one and all."""
        counts, seen = dict(self.counts), {*reading.outcomes, *claims.values()}
        changed: set[str] = set()
        probe = _State(self.problem, self.events, counts, {})
        for number, event in enumerate(self.events[self.position :], 1):
            probe.counts = probe.after(event)
            changed |= {update.owner for update in event.updates}
            if not {probe.counts.get(update.owner) for update in event.updates} <= seen:
                return 0
            if all(claims.get(owner) == probe.counts.get(owner) for owner in changed):
                return number
        return 0


def judge(problem: Problem, before: Sequence[str], step: str) -> Judgement:
    """Judge ``step`` after the steps ``before``, all without delimiters."""
    state = _State.begin(problem)
    for earlier in before:
        state.take(earlier)
    reading = state.read(step)
    if reading.boxed is not None:
        return _judge_answer(state, reading)
    sentence, claims = state.restated(step), state.claims(step, reading)
    is_event = sentence is not None and bool(sentence.updates)
    if not claims:
        if is_event:
            return Judgement(ErrorKind.OTHER, "says no result")
        if not reading.calculations and not _is_about_the_rest(problem, step):
            return Judgement(ErrorKind.OTHER, "says nothing of the problem")
        return _judge_numbers(state, reading, set())
    if not is_event and all(state.counts.get(actor) == n for actor, n in claims.items()):
        return _judge_numbers(state, reading, set())
    if state.position == len(state.events):
        return Judgement(ErrorKind.OTHER, "nothing happens any more")
    if sentence is not None and is_event:
        index = state.events.index(sentence)
        if index < state.position:
            return Judgement(ErrorKind.OTHER, "repeats an event")
        if index > state.position and not state.covered(reading, claims):
            return Judgement(ErrorKind.SKIPPED_EVENT, state.events[state.position].text)
    number = state.covered(reading, claims)
    if number:
        events = state.events[state.position : state.position + number]
        return _judge_work(state, reading, events, claims)
    return _explain(state, reading, claims, is_event)


def _is_about_the_rest(problem: Problem, step: str) -> bool:
    """Whether a step has most words of a sentence that changes nothing."""
    said = set(step.split())
    rest = (set(s.text.split()) for s in problem.sentences if not s.updates)
    return any(len(said & sentence) >= 0.6 * len(sentence) for sentence in rest)


def _judge_answer(state: _State, reading: Reading) -> Judgement:
    question = state.problem.question
    if state.position < len(state.events):
        return Judgement(ErrorKind.SKIPPED_EVENT, state.events[state.position].text)
    missing = [actor for actor in question.actors if actor not in state.counts]
    if missing:
        return Judgement(ErrorKind.SKIPPED_EVENT, f"nothing said what {missing[0]} has")
    wanted = question.answer(state.counts)
    known = {state.counts[actor] for actor in question.actors} | {question.price, wanted}
    others = {n for actor, n in state.counts.items() if actor not in question.actors}
    for actor, count in reading.has.items():
        if actor in state.counts and state.counts[actor] != count:
            return _foreign(state, count, actor)
    wrong = _judge_numbers(state, reading, known)
    if not wrong.is_right:
        return wrong
    if reading.boxed == wanted:
        return Judgement()
    assert reading.boxed is not None
    if reading.boxed in others:
        return Judgement(ErrorKind.ANOTHERS_NUMBER, str(reading.boxed))
    if reading.boxed in set[int]().union(*state.past.values()):
        return Judgement(ErrorKind.OTHER, f"{reading.boxed} is not what is asked for")
    if question.kind == "have":
        return Judgement(ErrorKind.INVENTED_NUMBER, str(reading.boxed))
    return Judgement(ErrorKind.ARITHMETIC_SLIP, f"{wanted} is answered as {reading.boxed}")


def _judge_work(
    state: _State, reading: Reading, events: Sequence[Sentence], claims: dict[str, int]
) -> Judgement:
    """The results are right: so must be everything on the way and everything else that is said."""
    known = set(claims.values())
    for event in events:
        for update in event.updates:
            known |= _numbers_of(state, update)
    changed = {update.owner for event in events for update in event.updates}
    for actor, count in (*reading.had.items(), *claims.items()):
        is_past = actor in reading.had and reading.had[actor] == count
        if (actor not in changed or is_past) and len(events) == 1:
            before = state.counts.get(actor, count)
            if count not in (before, claims.get(actor, before)):
                return _foreign(state, count, actor)
    return _judge_numbers(state, reading, known if len(events) == 1 else set())


def _numbers_of(state: _State, update: Update) -> set[int]:
    """Numbers that belong into the work of an update."""
    known = {*update.operands, prod(update.operands)}
    before = state.counts.get(update.source)
    if before is not None:
        known.add(before)
        if update.operator == "%":
            quotient = before // update.operands[0]
            known |= {quotient, quotient * update.operands[0]}
    return known


def _judge_numbers(state: _State, reading: Reading, known: set[int]) -> Judgement:
    """Whether calculations are true and, where ``known`` is given, start from known numbers."""
    values = set(known)
    for calculation in reading.calculations:
        foreign = [n for n in calculation.inputs if n not in values] if known else []
        if foreign:
            return _foreign(state, foreign[0], None)
        if not calculation.is_true:
            return Judgement(ErrorKind.ARITHMETIC_SLIP, " = ".join(calculation.expressions))
        values |= {n for text in calculation.expressions for n in numbers_in(text)}
        if calculation.result is not None:
            values.add(calculation.result)
    return Judgement()


def _foreign(state: _State, number: int, actor: str | None) -> Judgement:
    """A number that has no business here: somebody else's, an earlier one, or nobody's."""
    others = {n for name, n in state.counts.items() if name != actor}
    if number not in others and actor is not None and number in state.past.get(actor, ()):
        return Judgement(ErrorKind.SKIPPED_EVENT, f"{number} is what {actor} had earlier")
    elsewhere = {n for s in state.problem.sentences for n in numbers_in(s.text)}
    if number in others | elsewhere.union(*state.past.values()):
        return Judgement(ErrorKind.ANOTHERS_NUMBER, str(number))
    return Judgement(ErrorKind.INVENTED_NUMBER, str(number))


def _explain(
    state: _State, reading: Reading, claims: dict[str, int], names_event: bool
) -> Judgement:
    """What is wrong with a step whose results are not those of the next event.

    ``names_event``: the step says itself, word for word, that it is about this event.
    """
    event = state.events[state.position]
    wanted = state.after(event)
    for later in () if names_event else state.events[state.position + 1 :]:
        owners = {update.owner for update in later.updates}
        if all(claims.get(owner) == state.after(later).get(owner) for owner in owners):
            return Judgement(ErrorKind.SKIPPED_EVENT, event.text)
    owners = {update.owner for update in event.updates}
    for actor, count in claims.items():
        if actor not in owners and state.counts.get(actor, count) != count:
            return _foreign(state, count, actor)
    sources = {update.source for update in event.updates}
    known = {n for actor in sources for n in [state.counts.get(actor)] if n is not None}
    for update in event.updates:
        known |= {*_numbers_of(state, update), wanted.get(update.owner, -1)}
    for actor, count in reading.had.items():
        if state.counts.get(actor, count) != count:
            return _foreign(state, count, actor)
    wrong = _judge_numbers(state, reading, known)
    if not wrong.is_right:
        return wrong
    for update in event.updates:
        stated = claims.get(update.owner)
        if stated is None or stated == wanted.get(update.owner):
            continue
        if stated == state.counts.get(update.owner) and not reading.calculations:
            return Judgement(ErrorKind.SKIPPED_EVENT, event.text)
        if stated in (n for actor, n in state.counts.items() if actor != update.owner):
            return Judgement(ErrorKind.ANOTHERS_NUMBER, str(stated))
        if not reading.calculations:
            return Judgement(ErrorKind.ARITHMETIC_SLIP, f"{wanted[update.owner]} is due")
    return Judgement(ErrorKind.OTHER, "not what the event does")

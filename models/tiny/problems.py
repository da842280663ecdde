"""Word problems with worked steps, generated from a seed.

Up to three actors hold one kind of thing through two to seven events; each sentence of the problem
becomes one step, which restates it, says what the actor had, calculates, and ends with what the
actor has then. The generator knows nothing of tokenizers or models.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from specguard.models.tiny import language as words
from specguard.models.tiny.arithmetic import Update, product_work, sum_work
from specguard.models.tiny.events import World, propose
from specguard.models.tiny.language import CALIBRATION, HELD_OUT, TRAINING

__all__ = ["CALIBRATION", "DELIMITER", "HELD_OUT", "TRAINING", "Difficulty", "Problem", "Question"]
__all__ += ["Sentence", "generate", "stream"]

DELIMITER = "\n\n"
MAX_WORTH = 99  # the most things that a price is asked of


@dataclass(frozen=True, slots=True)
class Sentence:
    """One sentence: ``updates`` says what it does to the counts, nothing for a distractor.

    ``template`` is the phrasing that it was made from, before names and numbers.
    """

    text: str
    kind: str
    template: str
    updates: tuple[Update, ...] = ()
    facts: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: ``kind`` is have, total, difference or worth (``price`` dollars a piece)."""

    text: str
    kind: str
    actors: tuple[str, ...]
    price: int = 1

    def answer(self, counts: dict[str, int]) -> int:
        """The answer given what everybody has in the end."""
        held = [counts[actor] for actor in self.actors]
        if self.kind == "difference":
            return held[0] - held[1]
        return sum(held) * self.price


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem with its worked solution; ``steps`` carry no delimiter, the last one the answer."""

    text: str
    steps: tuple[str, ...]
    answer: int
    things: str
    sentences: tuple[Sentence, ...]
    question: Question

    @property
    def solution(self) -> str:
        """The steps as a model writes them, joined by the delimiter."""
        return DELIMITER.join(self.steps)


@dataclass(frozen=True, slots=True)
class Difficulty:
    """Bounds on what is generated; the defaults are those of calibration and held-out problems.

    ``large_share`` of the problems have numbers of three digits and more.
    """

    max_actors: int = 3
    max_events: int = 7
    max_distractors: int = 2
    large_share: float = 0.25


_NUM_EVENTS = {2: 0.34, 3: 0.28, 4: 0.16, 5: 0.11, 6: 0.07, 7: 0.04}
_NUM_ACTORS = {1: 0.40, 2: 0.43, 3: 0.17}
_NUM_DISTRACTORS = {0: 0.6, 1: 0.28, 2: 0.12}
_FULL = Difficulty()


def _draw(rng: np.random.Generator, shares: dict[int, float], highest: int) -> int:
    options = [value for value in shares if value <= highest]
    weights = np.array([shares[value] for value in options])
    return int(rng.choice(options, p=weights / weights.sum()))


def generate(stream: int, index: int, difficulty: Difficulty = _FULL) -> Problem:
    """Problem number ``index`` of a stream; the same arguments give the same problem.

    Names and things are the stream's own. Problems outside training hold at least one succession
    of two phrasings that training never sees.
    """
    rng = np.random.Generator(np.random.Philox(key=[stream, index]))
    num_actors = _draw(rng, _NUM_ACTORS, difficulty.max_actors)
    num_events = _draw(rng, _NUM_EVENTS, difficulty.max_events)
    num_distractors = _draw(rng, _NUM_DISTRACTORS, difficulty.max_distractors)
    while True:
        world = World.begin(rng, stream, num_actors, difficulty.large_share)
        problem = _attempt(world, num_events, num_distractors)
        if problem is not None:
            return problem


def stream(number: int, start: int = 0) -> Iterator[Problem]:
    """The endless sequence of a stream's problems from index ``start`` on."""
    index = start
    while True:
        yield generate(number, index)
        index += 1


def _attempt(world: World, num_events: int, num_distractors: int) -> Problem | None:
    is_training = world.stream == TRAINING
    sentences = _facts(world)
    num_facts = len(sentences)
    steps = [_fact_step(world, sentence) for sentence in sentences]
    has_held_out = False
    while len(sentences) < num_facts + num_events:
        event = _event(world)
        if event is None:
            return None
        if len(sentences) > num_facts:
            held_out = words.is_held_out(sentences[-1].template, event[0].template)
            if held_out and is_training:
                return None
            has_held_out |= held_out
        sentences.append(event[0])
        steps.append(event[1])
    if not is_training and not has_held_out:
        return None
    for _ in range(num_distractors):
        text, template = _distractor(world)
        if not world.open_with(text):
            return None
        place = int(world.rng.integers(num_facts, len(sentences) + 1))
        sentences.insert(place, Sentence(text, "distractor", template))
        steps.insert(place, f"{text} Nothing changes.")
    question = _ask(world)
    steps.append(answer_step(question, world.counts))
    text = " ".join([*(sentence.text for sentence in sentences), question.text])
    answer = question.answer(world.counts)
    return Problem(text, tuple(steps), answer, world.things, tuple(sentences), question)


def _facts(world: World) -> list[Sentence]:
    """The opening: what everybody has who is not introduced by a later comparison."""
    known = world.introduce()
    pair = words.language(world.stream).pair_facts
    if len(known) == 2 and world.rng.random() < 0.5:
        groups: list[tuple[str, ...]] = [known]
    else:
        groups = [known[i : i + 1] for i in range(len(known))]
    found = []
    for index, group in enumerate(groups):
        options = pair if len(group) == 2 else words.language(world.stream).facts
        template = world.pick(options if index == 0 else options[:3])
        a, b = group[0], group[-1]
        text = template.format(a=a, b=b, n=world.counts[a], m=world.counts[b], t=world.things)
        world.open_with(text)
        facts = tuple((actor, world.counts[actor]) for actor in group)
        found.append(Sentence(text, "fact", template, facts=facts))
    return found


def _fact_step(world: World, sentence: Sentence) -> str:
    actor, count = sentence.facts[0]
    plain = f"{actor} has {count} "
    if sentence.text.startswith(plain):
        return f"{sentence.text} Given."
    return f"{sentence.text} So {plain}{world.things}."


def _event(world: World) -> tuple[Sentence, str] | None:
    """The next event, applied to the counts, and its step; None where no draw fits."""
    for _ in range(40):
        found = propose(world)
        if found is None:
            continue
        kind, template, bare, updates = found
        text = bare
        if bare.split()[0] in world.actors and world.rng.random() < 0.6:
            text = f"{world.pick(words.language(world.stream).links)} {bare}"
        if not world.open_with(text):
            continue
        step = f"{text} {_apply(world, updates)}."
        return Sentence(text, kind, template, updates), step
    return None


def _apply(world: World, updates: tuple[Update, ...]) -> str:
    parts = []
    for update in updates:
        before = world.counts[update.source]
        after = update.apply(before)
        world.counts[update.owner] = after
        parts.append(
            f"{update.source} had {update.work(before)}, "
            f"so {update.owner} has {after} {world.things}"
        )
    return ", ".join(parts)


def _distractor(world: World) -> tuple[str, str]:
    template = world.pick(words.language(world.stream).distractors)
    name = world.pick((*world.actors, world.bystander))
    return template.format(c=name, n=world.amount(3, 60)), template


def _ask(world: World) -> Question:
    """A question that the final counts can answer."""
    options = words.language(world.stream).questions
    actors = tuple(actor for actor in world.actors if actor in world.counts)
    kinds = ["have", "have"]
    if len(actors) > 1:
        kinds += ["total", "difference"]
    if world.things != "dollars":
        kinds.append("worth")
    kind = world.pick(tuple(kinds))
    asked = world.pick(actors)
    lesser = [other for other in actors if world.counts[other] < world.counts[asked]]
    is_too_much = kind == "worth" and world.counts[asked] > MAX_WORTH
    if (kind == "difference" and not lesser) or is_too_much:
        kind = "have"
    chosen: tuple[str, ...] = (asked,)
    if kind == "total":
        chosen = actors
    elif kind == "difference":
        chosen = (asked, world.pick(tuple(lesser)))
    price = world.amount(2, 9) if kind == "worth" else 1
    text = world.pick(options[kind]).format(
        a=asked, b=chosen[-1], t=world.things, n=price, all=_listed(chosen)
    )
    return Question(text, kind, chosen, price)


def _listed(names: tuple[str, ...]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def answer_step(question: Question, counts: dict[str, int]) -> str:
    """The last step: the question, what it needs, and the boxed answer."""
    answer = question.answer(counts)
    held = [counts[actor] for actor in question.actors]
    parts = [f"{actor} has {count}" for actor, count in zip(question.actors, held, strict=True)]
    match question.kind:
        case "worth":
            parts.append(f"{product_work(held[0], question.price)} = {answer}")
        case "difference":
            parts.append(f"{sum_work(held[0], '-', held[1])} = {answer}")
        case "total":
            total = held[0]
            for count in held[1:]:
                parts.append(f"{sum_work(total, '+', count)} = {total + count}")
                total += count
        case _:
            pass
    return f"{question.text} {', '.join(parts)}, so the answer is \\boxed{{{answer}}}."

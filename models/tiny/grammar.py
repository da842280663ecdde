"""The language of the built-in pair's problems: what a text says in it, or what is outside of it.

Reads what `problems` generates, by the same words, phrasings, effects and bounds, and beyond them
only what the pair was measured to be right on too (README.md). Knows no models.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from specguard.core.errors import UsageError
from specguard.models.tiny import language as words
from specguard.models.tiny.arithmetic import Update
from specguard.models.tiny.events import (
    COMPARISONS,
    FACTORS,
    FACTORS_OF,
    MONEY,
    PRODUCTS,
    opening_of,
    updates_of,
)
from specguard.models.tiny.problems import MAX_WORTH, Difficulty, Question, Sentence

_HINT = "other problems need other models: specguard models"
LEAST = 2  # no count or amount is smaller
MOST = 100  # of what a problem says or comes to: above, too many answers are wrong (README.md)
_MOST_SHOWN = 60  # characters of a word or a sentence
_STREAMS = (words.TRAINING, words.CALIBRATION, words.HELD_OUT)
_LANGUAGE = words.language(words.TRAINING)  # all but names and things is the same in every stream
# What no problem of the generator says, and the pair understands. Not all that is alike: "sells {n}
# {t}" and "uses {n} {t}" it takes for something else.
_ALSO = {
    "gain": (
        "{a} buys {n} more {t}.",
        "{a} finds {n} {t}.",
        "{a} gets {n} more {t}.",
        "{a} picks up {n} more {t}.",
        "{a} collects {n} {t}.",
        "{a} wins {n} more {t}.",
    ),
    "lose": (
        "{a} loses {n} of the {t}.",
        "{a} drops {n} of the {t}.",
        "{a} throws away {n} of the {t}.",
    ),
    "half": (
        "{a} drops half of the {t}.",
        "{a} throws away half of the {t}.",
        "{a} uses half of the {t}.",
    ),
    "earn": ("{a} earns {n} more {t}.", "{a} saves {n} {t}."),
}


@dataclass(slots=True)
class Reading:
    """A problem's sentences, the things that are counted, and who has how many in the end.

    ``most`` is the largest number that was allowed in it.
    """

    most: int
    sentences: list[Sentence] = field(default_factory=list)
    things: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    question: Question | None = None


@dataclass(frozen=True, slots=True)
class Form:
    """A phrasing; ``pattern`` has a group for each of its placeholders."""

    kind: str
    template: str
    pattern: re.Pattern[str]


def check(text: str) -> None:
    """Refuse a problem that the built-in pair was not made for.

    Raises:
        UsageError: it is outside of the pair's language; says where.
    """
    read(text)


def read(text: str, most: int = MOST) -> Reading:
    """What a problem says; blanks around it do not count. ``most`` is the largest number in it.

    Raises:
        UsageError: it is outside of the pair's language; says where.
    """
    text = text.strip()
    _check_words(text, most)
    *sentences, question = re.split(r"(?<=[.?]) ", text)
    reading = Reading(most)
    openings: set[str] = set()
    for sentence in sentences:
        _take(reading, sentence)
        opening = opening_of(sentence, _names())
        if opening in openings:
            raise _outside(f'two sentences begin with "{opening}"')
        openings.add(opening)
    reading.question = _ask(reading, question)
    bounds = Difficulty()
    if len(reading.counts) > bounds.max_actors:
        raise _outside(f"it is about more than {bounds.max_actors} people")
    if sum(bool(sentence.updates) for sentence in reading.sentences) > bounds.max_events:
        raise _outside(f"more than {bounds.max_events} things happen")
    return reading


def _take(reading: Reading, text: str) -> None:
    """Read one sentence, and do what it says."""
    form, parts = _matched(reading, text, _sentence_forms())
    sentence = Sentence(text, form.kind, form.template)
    if form.kind == "fact":
        sentence = replace(sentence, facts=_facts(reading, parts))
    elif form.kind != "distractor":
        sentence = replace(sentence, updates=_updates(reading, text, form.kind, parts))
    reading.sentences.append(sentence)


def _facts(reading: Reading, parts: dict[str, str]) -> tuple[tuple[str, int], ...]:
    if any(sentence.updates for sentence in reading.sentences):
        raise _outside(f"what {parts['a']} has is to be said before anything happens")
    facts = [(parts["a"], int(parts["n"]))]
    if "b" in parts:
        facts.append((parts["b"], int(parts["m"])))
    for actor, count in facts:
        _check_new(reading, actor)
        reading.counts[actor] = count
    return tuple(facts)


def _updates(reading: Reading, text: str, kind: str, parts: dict[str, str]) -> tuple[Update, ...]:
    source, other = parts["a"], parts.get("b", "")
    _check_known(reading, source)
    if kind in COMPARISONS:
        _check_new(reading, other)
    elif other:
        _check_known(reading, other)
    n, m = (int(parts.get(key, LEAST)) for key in "nm")
    most = FACTORS_OF.get(kind, FACTORS if kind in PRODUCTS else (LEAST, reading.most))[1]
    updates = updates_of(kind, source, other, n, m)
    fits = (update.fits(reading.counts[update.source]) for update in updates)
    if source == other or max(n, m) > most or not all(fits):
        raise _outside(f'"{_short(text)}" comes to nothing that it can work out')
    reading.counts |= {u.owner: u.apply(reading.counts[u.source]) for u in updates}
    if max(reading.counts.values()) > reading.most:
        raise _outside(f'"{_short(text)}" comes to more than {reading.most}')
    return updates


def _ask(reading: Reading, text: str) -> Question:
    form, parts = _matched(reading, text, _question_forms(), "question")
    actors = tuple(re.split(r", | and ", parts["all"])) if "all" in parts else (parts["a"],)
    if "b" in parts:
        actors = (*actors, parts["b"])
    for actor in actors:
        _check_known(reading, actor)
    question = Question(text, form.kind, actors, int(parts.get("n", 1)))
    is_worth = form.kind == "worth"
    if (
        len(set(actors)) < len(actors)
        or question.answer(reading.counts) < 1
        or question.price > FACTORS[1]
        or (is_worth and (reading.things == MONEY or reading.counts[actors[0]] > MAX_WORTH))
    ):
        raise _outside(f'"{_short(text)}" has no answer that it can work out')
    return question


def _outside(reason: str) -> UsageError:
    return UsageError(f"the built-in pair cannot solve this: {reason}", _HINT)


def _short(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _check_words(text: str, most: int) -> None:
    if text != " ".join(text.split()):
        raise _outside("more than a blank stands between two words")
    for word in text.split(" "):
        bare = re.sub(r"[.,?]$", "", word)
        if any(character.isdigit() for character in bare):
            is_whole = re.fullmatch(r"[1-9][0-9]{0,3}", bare) is not None
            if not is_whole or not LEAST <= int(bare) <= most:
                raise _outside(
                    f'it reads whole numbers from {LEAST} to {most}, not "{_short(bare)}"'
                )
        elif bare not in _vocabulary():
            raise _outside(f'it does not know the word "{_short(bare or word)}"')


def _check_new(reading: Reading, actor: str) -> None:
    if actor in reading.counts:
        raise _outside(f"it is said twice what {actor} has")


def _check_known(reading: Reading, actor: str) -> None:
    if actor not in reading.counts:
        raise _outside(f"nothing says what {actor} has at first")


def _matched(
    reading: Reading, text: str, forms: Sequence[Form], what: str = "sentence"
) -> tuple[Form, dict[str, str]]:
    """The form of a sentence, and what stands for its placeholders.

    A few sentences are of two kinds (gained things, earned dollars), which do the same.
    """
    for form in forms:
        found = form.pattern.fullmatch(text)
        if found is not None:
            parts = found.groupdict()
            reading.things = reading.things or parts.get("t", "")
            if parts.get("t", reading.things) != reading.things:
                raise _outside(
                    f"it counts one kind of thing, not {reading.things} and {parts['t']}"
                )
            return form, parts
    raise _outside(f'it knows no {what} like "{_short(text)}"')


@cache
def event_forms() -> tuple[Form, ...]:
    """Every phrasing of an event."""
    known = _LANGUAGE.phrasings.items()
    return _forms({kind: (*texts, *_ALSO.get(kind, ())) for kind, texts in known})


@cache
def _sentence_forms() -> tuple[Form, ...]:
    facts = _forms({"fact": (*_LANGUAGE.facts, *_LANGUAGE.pair_facts)})
    return (*facts, *event_forms(), *_forms({"distractor": _LANGUAGE.distractors}))


@cache
def _question_forms() -> tuple[Form, ...]:
    return _forms(_LANGUAGE.questions)


def _forms(kinds: dict[str, tuple[str, ...]]) -> tuple[Form, ...]:
    return tuple(
        Form(kind, template, _pattern(template, kind in _LANGUAGE.phrasings))
        for kind, templates in kinds.items()
        for template in templates
    )


def _pattern(template: str, is_event: bool) -> re.Pattern[str]:
    """What a template generates; an event that begins with a name may have a link before it."""
    name = _one_of(_names())
    number = "[0-9]+"
    classes = {
        **dict.fromkeys("abc", name),
        **dict.fromkeys("nm", number),
        "t": _one_of(_things()),
        "g": _one_of(_LANGUAGE.goods),
        "all": f"{name}(?:, {name})* and {name}",
    }
    parts = re.split(r"\{(\w+)\}", template)  # text and placeholders in turn
    pattern = re.escape(parts[0])
    for index in range(1, len(parts), 2):
        key = parts[index]
        is_known = f"(?P<{key}>" in pattern
        pattern += f"(?P={key})" if is_known else f"(?P<{key}>{classes[key]})"
        pattern += re.escape(parts[index + 1])
    link = f"(?:{_one_of(_LANGUAGE.links)} )?" if is_event and not parts[0] else ""
    return re.compile(link + pattern)


def _one_of(options: Iterable[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, options))})"


@cache
def _names() -> frozenset[str]:
    return frozenset(name for stream in _STREAMS for name in words.language(stream).names)


@cache
def _things() -> frozenset[str]:
    return frozenset((MONEY, *(t for s in _STREAMS for t in words.language(s).things)))


@cache
def _vocabulary() -> frozenset[str]:
    """Every word of the language, without punctuation behind it."""
    templates = [form.template for form in (*_sentence_forms(), *_question_forms())]
    texts = " ".join((*templates, *_LANGUAGE.links, *_LANGUAGE.goods, *_names(), *_things()))
    return frozenset(re.sub(r"[.,?]$", "", word) for word in texts.split())

"""Grade-school word problems with worked steps, generated from a seed.

A problem follows one kind of thing through two to five events; each event becomes one step that
restates it, names what the actor had and computes what the actor has then. The generator knows
nothing of tokenizers or models.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

DELIMITER = "\n\n"
MAX_COUNT = 400

# One stream of problems per use, so that no problem is seen in training and reported on.
TRAINING, CALIBRATION, HELD_OUT = 1, 2, 3

NAMES = [
    "Adam",
    "Aisha",
    "Alex",
    "Alice",
    "Amir",
    "Amy",
    "Ana",
    "Andre",
    "Anna",
    "Ava",
    "Ben",
    "Bella",
    "Beth",
    "Bruno",
    "Carla",
    "Carlos",
    "Chen",
    "Chloe",
    "Clara",
    "Cody",
    "Dana",
    "Daniel",
    "David",
    "Diego",
    "Dina",
    "Elena",
    "Eli",
    "Ella",
    "Emil",
    "Emma",
    "Eric",
    "Eva",
    "Felix",
    "Finn",
    "Fiona",
    "Gina",
    "Grace",
    "Hana",
    "Hannah",
    "Hugo",
    "Ian",
    "Ida",
    "Iris",
    "Ivan",
    "Jack",
    "Jada",
    "James",
    "Jane",
    "Jill",
    "John",
    "Jonas",
    "Jose",
    "Julia",
    "Kai",
    "Karen",
    "Kate",
    "Kofi",
    "Lara",
    "Leah",
    "Lena",
    "Leo",
    "Liam",
    "Lily",
    "Lina",
    "Lisa",
    "Lucas",
    "Lucy",
    "Luis",
    "Maria",
    "Mark",
    "Marta",
    "Mary",
    "Max",
    "Maya",
    "Mia",
    "Mila",
    "Milo",
    "Nadia",
    "Nina",
    "Noah",
    "Nora",
    "Oliver",
    "Olga",
    "Omar",
    "Oscar",
    "Owen",
    "Paul",
    "Pedro",
    "Priya",
    "Rafael",
    "Ravi",
    "Rosa",
    "Ruby",
    "Sam",
    "Sana",
    "Sara",
    "Sofia",
    "Tara",
    "Theo",
    "Tim",
    "Tom",
    "Tyler",
    "Uma",
    "Vera",
    "Victor",
    "Wei",
    "Will",
    "Yara",
    "Yuki",
    "Zara",
    "Zoe",
]

THINGS = [
    "apples",
    "badges",
    "bananas",
    "beads",
    "berries",
    "blocks",
    "books",
    "bottles",
    "boxes",
    "buttons",
    "cakes",
    "candies",
    "candles",
    "cards",
    "carrots",
    "chairs",
    "cherries",
    "chips",
    "clips",
    "coins",
    "cookies",
    "crayons",
    "cups",
    "dolls",
    "eggs",
    "erasers",
    "feathers",
    "flags",
    "flowers",
    "forks",
    "grapes",
    "hats",
    "jars",
    "keys",
    "kites",
    "lemons",
    "marbles",
    "masks",
    "medals",
    "melons",
    "muffins",
    "mugs",
    "nuts",
    "onions",
    "oranges",
    "papers",
    "peaches",
    "pears",
    "pebbles",
    "pencils",
    "pens",
    "photos",
    "pies",
    "pins",
    "plates",
    "plums",
    "postcards",
    "posters",
    "potatoes",
    "puzzles",
    "ribbons",
    "rings",
    "rocks",
    "roses",
    "seeds",
    "shells",
    "shirts",
    "socks",
    "spoons",
    "stamps",
    "stars",
    "stickers",
    "stones",
    "straws",
    "tickets",
    "tiles",
    "toys",
    "trees",
    "tulips",
]

NUMBER_WORDS = {2: "twice", 3: "three times", 4: "four times"}


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem with its worked solution; ``steps`` carry no delimiter, the last one the answer."""

    text: str
    steps: tuple[str, ...]
    answer: int

    @property
    def solution(self) -> str:
        """The steps as a model writes them, joined by the delimiter."""
        return DELIMITER.join(self.steps)


@dataclass(slots=True)
class _World:
    rng: np.random.Generator
    actors: list[str]
    things: str
    counts: dict[str, int]
    tracks_both: bool

    def pick(self, options: list[str]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def amount(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))


# An event changes the counts and returns its wording and its step, or None where it does not fit.
_Event = Callable[[_World, str], tuple[str, str] | None]


def _change(world: _World, actor: str, symbol: str, operand: int) -> str:
    before = world.counts[actor]
    after = {
        "+": before + operand,
        "-": before - operand,
        "*": before * operand,
        "/": before // operand,
    }[symbol]
    world.counts[actor] = after
    return f"{actor} had {before}, so {before} {symbol} {operand} = {after}."


def _gain(verbs: list[str]) -> _Event:
    def event(world: _World, actor: str) -> tuple[str, str] | None:
        n = world.amount(2, 40)
        if world.counts[actor] + n > MAX_COUNT:
            return None
        verb = world.pick(verbs)
        more = world.pick([" more", ""])
        step = _change(world, actor, "+", n)
        fact = f"{actor} {verb} {n}{{}} {world.things}."
        return fact.format(more), f"{fact.format('')} {step}"

    return event


def _loss(verbs: list[str]) -> _Event:
    def event(world: _World, actor: str) -> tuple[str, str] | None:
        if world.counts[actor] < 4:
            return None
        n = world.amount(2, min(40, world.counts[actor] - 1))
        verb = world.pick(verbs)
        of_the = world.pick([" of the", ""])
        step = _change(world, actor, "-", n)
        fact = f"{actor} {verb} {n}{{}} {world.things}."
        return fact.format(of_the), f"{fact.format('')} {step}"

    return event


def _half(verbs: list[str]) -> _Event:
    def event(world: _World, actor: str) -> tuple[str, str] | None:
        if world.counts[actor] < 4 or world.counts[actor] % 2:
            return None
        verb = world.pick(verbs)
        wording = world.pick([f"half of the {world.things}", f"half the {world.things}"])
        step = _change(world, actor, "/", 2)
        return f"{actor} {verb} {wording}.", f"{actor} {verb} half of the {world.things}. {step}"

    return event


def _multiply(world: _World, actor: str) -> tuple[str, str] | None:
    factor = world.amount(2, 4)
    if world.counts[actor] * factor > MAX_COUNT:
        return None
    wordings = [
        f"{actor} now has {NUMBER_WORDS[factor]} as many {world.things}.",
        f"{actor} multiplies the number of {world.things} by {factor}.",
    ]
    if factor < 4:
        wordings.append(f"{actor} {'doubles' if factor == 2 else 'triples'} the {world.things}.")
    step = _change(world, actor, "*", factor)
    return world.pick(wordings), f"{actor} multiplies the {world.things} by {factor}. {step}"


def _give(world: _World, actor: str) -> tuple[str, str] | None:
    others = [a for a in world.actors if a != actor]
    if not others or world.counts[actor] < 4:
        return None
    n = world.amount(2, min(40, world.counts[actor] - 1))
    other = others[0]
    if world.tracks_both and world.counts[other] + n > MAX_COUNT:
        return None
    wording = world.pick(
        [
            f"{actor} gives {n} {world.things} to {other}.",
            f"{actor} gives {other} {n} {world.things}.",
        ]
    )
    given = _change(world, actor, "-", n)
    received = f" {_change(world, other, '+', n)}" if world.tracks_both else ""
    return wording, f"{actor} gives {n} {world.things} to {other}. {given}{received}"


EVENTS: tuple[_Event, ...] = (
    _gain(["buys", "finds", "gets", "collects", "picks up"]),
    _gain(["buys", "finds", "wins", "makes"]),
    _loss(["loses", "sells", "breaks", "gives away", "throws away"]),
    _half(["sells", "loses", "gives away", "throws away"]),
    _multiply,
    _give,
)
_SYLLABLES = [
    "ba",
    "be",
    "bo",
    "da",
    "do",
    "fa",
    "ga",
    "ha",
    "jo",
    "ka",
    "ki",
    "la",
    "le",
    "lo",
    "ma",
    "mi",
    "mo",
    "na",
    "ni",
    "no",
    "pa",
    "ra",
    "ri",
    "ro",
    "sa",
    "ta",
    "ti",
    "to",
    "va",
    "zi",
]
_LINKS = ["", "", "Then ", "Then ", "After that, ", "Later, ", "Next, "]


def _made_up(rng: np.random.Generator) -> str:
    """A word outside the lists, so that a model learns to copy names that it has never seen."""
    return "".join(
        _SYLLABLES[i] for i in rng.integers(len(_SYLLABLES), size=int(rng.integers(2, 4)))
    )


def _choose_words(rng: np.random.Generator, num_actors: int) -> tuple[list[str], str]:
    actors = [NAMES[i] for i in rng.choice(len(NAMES), num_actors, replace=False)]
    things = THINGS[int(rng.integers(len(THINGS)))]
    if rng.random() < 0.1:
        actors[0] = _made_up(rng).capitalize() + "n"
    if rng.random() < 0.1:
        things = _made_up(rng) + "s"
    return actors, things


def generate(stream: int, index: int, tracks_both: bool = False) -> Problem:
    """Problem number ``index`` of a stream; the same arguments give the same problem.

    The count of one actor is followed; a second one, where there is one, only receives. With
    ``tracks_both`` the second one acts too, and the question may be about either.
    """
    rng = np.random.Generator(np.random.Philox(key=[stream, index]))
    actors, things = _choose_words(rng, 2 if rng.random() < 0.6 else 1)
    followed = actors if tracks_both else actors[:1]
    counts = {actor: int(rng.integers(4, 81)) for actor in followed}
    world = _World(rng, actors, things, counts, tracks_both)
    sentences = [
        f"{a} {world.pick(['has', 'has', 'starts with', 'had'])} {world.counts[a]} {things}."
        for a in followed
    ]
    steps: list[str] = []
    num_events = int(rng.integers(2, 6))
    while len(steps) < num_events:
        actor = followed[int(rng.integers(len(followed)))]
        outcome = EVENTS[int(rng.integers(len(EVENTS)))](world, actor)
        if outcome is None:
            continue
        sentences.append((world.pick(_LINKS) if steps else "") + outcome[0])
        steps.append(outcome[1])
    asked = followed[int(rng.integers(len(followed)))]
    sentences.append(
        f"How many {things} does {asked} have{world.pick(['', ' now', ' left', ' in the end'])}?"
    )
    answer = world.counts[asked]
    steps.append(f"The answer is \\boxed{{{answer}}}.")
    return Problem(" ".join(sentences), tuple(steps), answer)


def stream(number: int, start: int = 0) -> Iterator[Problem]:
    """The endless sequence of a stream's problems from index ``start`` on."""
    index = start
    while True:
        yield generate(number, index)
        index += 1

"""The kinds of events: which fit the state of a problem, and what they do to the counts."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from specguard.models.tiny import language as words
from specguard.models.tiny.arithmetic import Update

MONEY = "dollars"
_ANY_THINGS = ("half", "double", "times", "share", "rest", "give")
COUNTED = ("gain", "lose", "bags", "rate", *_ANY_THINGS)
PAID = ("earn", "pay", "price", "sale", "half", "double", "give", "share")
COMPARISONS = ("more", "fewer", "times_as", "half_as")
PRODUCTS = ("bags", "rate", "sale", "price")  # kinds that add or take a product of two factors
# Bounds of factors, both included, and those of what a count is multiplied or divided by.
FACTORS = (2, 9)
FACTORS_OF = {"times": (3, 5), "share": (3, 9), "rest": (3, 9), "times_as": (2, 5)}


@dataclass(slots=True)
class World:
    """The state while a problem is being made: ``counts`` by actor, what sentences began with."""

    rng: np.random.Generator
    stream: int
    actors: tuple[str, ...]
    bystander: str
    things: str
    scale: int
    counts: dict[str, int] = field(default_factory=dict)
    openings: set[str] = field(default_factory=set)

    @classmethod
    def begin(
        cls, rng: np.random.Generator, stream: int, num_actors: int, large_share: float
    ) -> Self:
        """Draw the words and the size of the numbers."""
        language = words.language(stream)
        chosen = rng.choice(len(language.names), num_actors + 1, replace=False)
        names = [language.names[i] for i in chosen]
        is_money = rng.random() < 0.2
        things = MONEY if is_money else language.things[int(rng.integers(len(language.things)))]
        is_large = rng.random() < large_share
        scale = 30
        if is_large:
            scale = 1500 if rng.random() < 0.2 else 150
        return cls(rng, stream, tuple(names[1:]), names[0], things, scale)

    def pick(self, options: Sequence[str]) -> str:
        """One of the options."""
        return options[int(self.rng.integers(len(options)))]

    def amount(self, low: int, high: int) -> int:
        """A number from ``low`` to ``high``, both included."""
        return int(self.rng.integers(low, high + 1))

    def introduce(self) -> tuple[str, ...]:
        """Give the first actor and most others a count; the rest wait for a comparison."""
        for index, actor in enumerate(self.actors):
            if index == 0 or self.rng.random() < 0.65:
                self.counts[actor] = self.amount(self.scale // 8, self.scale * 2)
        return tuple(self.counts)

    def open_with(self, text: str) -> bool:
        """Whether no sentence began like ``text`` yet; remembers that one does now."""
        opening = opening_of(text, (*self.actors, self.bystander))
        if opening in self.openings:
            return False
        self.openings.add(opening)
        return True


def opening_of(text: str, names: Collection[str]) -> str:
    """What a sentence is known by: its first word or, where that is a name, its first two."""
    first, second = text.split()[:2]
    return f"{first} {second}" if first in names else first


def propose(world: World) -> tuple[str, str, str, tuple[Update, ...]] | None:
    """A random event that fits: its kind, its template, its sentence and its updates."""
    waiting = [actor for actor in world.actors if actor not in world.counts]
    known = tuple(world.counts)
    source = world.pick(known)
    if waiting and world.rng.random() < 0.5:
        kind, other = world.pick(COMPARISONS), waiting[0]
    else:
        kind = world.pick(PAID if world.things == MONEY else COUNTED)
        others = [actor for actor in known if actor != source]
        other = world.pick(others) if others else ""
    if kind == "give" and not other:
        return None
    n, m = _numbers(world, kind, world.counts[source])
    updates = updates_of(kind, source, other, n, m)
    counts = dict(world.counts)
    for update in updates:
        if not update.fits(counts[update.source]):
            return None
        counts[update.owner] = update.apply(counts[update.source])
    language = words.language(world.stream)
    template = world.pick(language.phrasings[kind])
    goods = world.pick(language.goods)
    text = template.format(a=source, b=other, n=n, m=m, t=world.things, g=goods)
    return kind, template, text, updates


def _numbers(world: World, kind: str, count: int) -> tuple[int, int]:
    """The numbers of a sentence about somebody who has ``count``; they may not fit it yet."""
    n, m = (world.amount(*FACTORS) for _ in range(2))
    match kind:
        case "gain" | "earn" | "more":
            n = world.amount(2, world.scale)
        case "lose" | "pay" | "give":
            n = world.amount(2, max(2, min(world.scale, count - 1)))
        case "fewer":
            n = world.amount(2, max(2, min(world.scale, count)))
        case _ if kind in FACTORS_OF:
            n = world.amount(*FACTORS_OF[kind])
        case _:
            pass
    return n, m


def updates_of(kind: str, source: str, other: str, n: int, m: int) -> tuple[Update, ...]:
    """What an event does: ``source`` is the phrasings' ``{a}``, ``other`` their ``{b}``."""
    match kind:
        case "gain" | "earn":
            return (Update(source, source, "+", (n,)),)
        case "lose" | "pay":
            return (Update(source, source, "-", (n,)),)
        case "half":
            return (Update(source, source, "/", (2,)),)
        case "double":
            return (Update(source, source, "*", (2,)),)
        case "times":
            return (Update(source, source, "*", (n,)),)
        case "give":
            return Update(source, source, "-", (n,)), Update(other, other, "+", (n,))
        case "bags" | "rate" | "sale":
            return (Update(source, source, "+", (n, m)),)
        case "price":
            return (Update(source, source, "-", (n, m)),)
        case "share":
            return (Update(source, source, "/", (n,)),)
        case "rest":
            return (Update(source, source, "%", (n,)),)
        case "more" | "fewer":
            return (Update(other, source, "+" if kind == "more" else "-", (n,)),)
        case "times_as":
            return (Update(other, source, "*", (n,)),)
        case "half_as":
            return (Update(other, source, "/", (2,)),)
        case _:
            raise ValueError(kind)

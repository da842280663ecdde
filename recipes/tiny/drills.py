"""Exercises in calculation: lines as the steps have them, many to a text, for early training.

A problem spends most of its tokens on other things; these are calculations alone.
"""

import numpy as np

from specguard.models.tiny import language as words
from specguard.models.tiny.arithmetic import Update

_LINES = 10
_DRILLS = 4  # the stream of the exercises: no problem has it


def drill(index: int) -> list[tuple[str, bool]]:
    """Exercise number ``index``: pieces of text, and whether they follow from what is before."""
    rng = np.random.Generator(np.random.Philox(key=[_DRILLS, index]))
    language = words.language(words.TRAINING)
    name = language.names[int(rng.integers(len(language.names)))]
    things = language.things[int(rng.integers(len(language.things)))]
    pieces = []
    for _ in range(_LINES):
        before, update = _calculation(rng, name)
        work, result = update.work(before), update.apply(before)
        given = work.split(" = ")[0]
        if update.operator == "%":
            given = f"{before} = {update.operands[0]}"
        pieces.append((f"{name} had {given}", False))
        rest = work.removeprefix(given)
        pieces.append((f"{rest}, so {name} has {result} {things}.\n\n", True))
    return pieces


def _calculation(rng: np.random.Generator, name: str) -> tuple[int, Update]:
    def amount(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    while True:
        highest = int(rng.choice([60, 300, 1500, 4000], p=[0.5, 0.35, 0.1, 0.05]))
        before = amount(2, highest)
        match amount(0, 9):
            case 0 | 1 | 2:
                update = Update(name, name, "+", (amount(2, highest // 2),))
            case 3 | 4 | 5:
                update = Update(name, name, "-", (amount(2, max(2, before - 1)),))
            case 6:
                sign = "+-"[amount(0, 1)]
                update = Update(name, name, sign, (amount(2, 9), amount(2, 9)))
            case 7:
                before = amount(2, 99)
                update = Update(name, name, "*", (amount(2, 5),))
            case 8:
                before = amount(2, 99)
                update = Update(name, name, "%", (amount(3, 9),))
            case _:
                divisor = 2 if rng.random() < 0.5 else amount(3, 9)
                before = amount(2, highest if divisor == 2 else 99 // divisor) * divisor
                update = Update(name, name, "/", (divisor,))
        if update.fits(before):
            return before, update

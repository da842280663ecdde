"""Kinds of values that options take; what lies outside is refused with the option's name."""

import math
from typing import Any

import click

from specguard.core.config import MAX_CANDIDATES

_MAX_COUNT = 2**31 - 1  # more than there is room for; what fits is found out where it is loaded
_MAX_SEED = 2**64 - 1


class Whole(click.IntRange):
    """A whole number from ``least`` on; its upper end is no limit that anybody should meet."""

    name = "integer"

    def __init__(self, least: int, most: int) -> None:
        super().__init__(least)
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read one."""
        number: int = super().convert(value, param, ctx)
        if number > self._most:
            self.fail(f"{value} is more than {self._most}.", param, ctx)
        return number


class Number(click.FloatRange):
    """A number in a range; neither infinite nor "nan", which would lie in any."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read one."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is no number to calculate with.", param, ctx)
        return number


class Several(click.ParamType[tuple[Any, ...]]):
    """Values of one kind separated by commas, each once."""

    def __init__(self, kind: click.ParamType[Any]) -> None:
        self.kind = kind
        self.name = f"{kind.name},..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """Read them; a tuple has been read already."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        return tuple(dict.fromkeys(self.kind.convert(part, param, ctx) for part in parts))


class Part(click.ParamType[tuple[int, int]]):
    """One of N equal parts, like 3/16; the first is 1."""

    name = "I/N"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Read it; a tuple has been read already."""
        if isinstance(value, tuple):
            return value
        number, slash, count = str(value).partition("/")
        if not (slash and number.isdecimal() and count.isdecimal()):
            self.fail(f"{value!r} is no part like 3/16.", param, ctx)
        part = COUNT.convert(number, param, ctx), COUNT.convert(count, param, ctx)
        if part[0] > part[1]:
            self.fail(f"there is no part {number} of {count}.", param, ctx)
        return part


SHARE = Number(0, 1)
CANDIDATES = Whole(1, MAX_CANDIDATES)
GUESSES = Whole(0, MAX_CANDIDATES)
COUNT = Whole(1, _MAX_COUNT)
SEED = Whole(0, _MAX_SEED)

"""What an event does to a count, as a value and as the work that a step shows."""

from dataclasses import dataclass
from math import prod

MAX_COUNT = 9999


@dataclass(frozen=True, slots=True)
class Update:
    """``owner`` has afterwards what ``source`` had, changed by ``operator`` and ``operands``.

    Operators: ``+``, ``-``, ``*``, ``/`` (exact), ``%`` (what is left over). Two operands behind
    ``+`` or ``-`` are multiplied first.
    """

    owner: str
    source: str
    operator: str
    operands: tuple[int, ...]

    def apply(self, before: int) -> int:
        """The count after the update."""
        amount = prod(self.operands)
        match self.operator:
            case "+":
                return before + amount
            case "-":
                return before - amount
            case "*":
                return before * amount
            case "/":
                return before // amount
            case "%":
                return before % amount
            case _:
                raise ValueError(self.operator)

    def fits(self, before: int) -> bool:
        """Whether the work stays within what the steps can show."""
        amount = prod(self.operands)
        match self.operator:
            case "+":
                return before + amount <= MAX_COUNT
            case "-":
                return before - amount >= 2
            case "*":
                return 2 <= before < 100
            case "/":
                is_small = before < 100 or amount == 2
                return is_small and before % amount == 0 and before // amount >= 2
            case _:
                return 2 <= before // amount <= 9 and before % amount >= 2

    def work(self, before: int) -> str:
        """The calculation without its result: "12 + 9", "48 + 37 = 78 + 7"."""
        match self.operator, self.operands:
            case ("+" | "-") as sign, (first, second):
                work = sum_work(before, sign, first * second)
                return f"{before} {sign} {first} * {second} = {work}"
            case ("+" | "-") as sign, (amount,):
                return sum_work(before, sign, amount)
            case "*", (factor,):
                return product_work(before, factor)
            case "%", (size,):
                return f"{before} = {size} * {before // size} + {before % size}"
            case _:
                return f"{before} {self.operator} {self.operands[0]}"


def sum_work(first: int, sign: str, second: int) -> str:
    """A sum or difference, one digit of the second number at a time: "48 + 37 = 78 + 7"."""
    parts = [f"{first} {sign} {second}"]
    place = 10 ** (len(str(second)) - 1)
    while second % place:
        amount = second // place * place
        if amount:
            first += amount if sign == "+" else -amount
            second -= amount
            parts.append(f"{first} {sign} {second}")
        place //= 10
    return " = ".join(parts)


def product_work(count: int, factor: int) -> str:
    """A product of a count below 100 by tens and ones: "36 * 4 = 120 + 24 = 140 + 4", "8 * 4"."""
    tens, ones = count // 10 * 10, count % 10
    if not tens or not ones:
        return f"{count} * {factor}"
    return f"{count} * {factor} = {sum_work(tens * factor, '+', ones * factor)}"

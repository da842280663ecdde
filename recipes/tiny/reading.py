"""What a step of a solution says: who has how many, what is calculated, what the answer is.

Knows names and numbers, not the generator's wording.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

_NUMBER = r"\d+(?:,\d{3})*"
# A multiplication sign and a minus sign may also be the typographic ones.
_TIMES, _MINUS, _OVER = "*x\u00d7", "-\u2212", "/\u00f7"
_OPERATOR = rf"[{_MINUS}+{_TIMES}{_OVER}]"
_EXPRESSION = rf"{_NUMBER}(?:\s*{_OPERATOR}\s*{_NUMBER})*"
_CHAIN = re.compile(rf"{_EXPRESSION}(?:\s*=\s*{_EXPRESSION})*")
_BOXED = re.compile(r"\\boxed\{\s*\$?\s*(\d[\d,]*)\s*\}")
_HOLDS = "has|have|had|owns|owned|holds|held|keeps|kept|is left with|was left with|ends up with"
_PAST = {"had", "owned", "held", "was left with"}
# "Tom has 5 more shells than Mia" does not say how many he has.
_RELATIVE = r"(?!\d)(?!\s*(?:more|fewer|less|times)\b)"


@dataclass(frozen=True, slots=True)
class Calculation:
    """Expressions said to be equal, and the value said to follow from them (None: nobody's)."""

    expressions: tuple[str, ...]
    result: int | None

    @property
    def inputs(self) -> tuple[int, ...]:
        """The numbers that go in: those of the first expression."""
        start = self.expressions[0]
        if _is_work(start) or len(self.expressions) == 1:
            return tuple(dict.fromkeys(_numbers(start)))
        # "45 = 6 * 7 + 3" takes a number apart: how often it fits in is worked out.
        return tuple(dict.fromkeys((*_numbers(start), _numbers(self.expressions[1])[0])))

    @property
    def is_true(self) -> bool:
        """Whether all expressions are equal, and the result with them.

        "45 = 6 * 7 + 3" takes 45 apart: what follows is the rest, 3.
        """
        values = {evaluate(text) for text in self.expressions}
        if len(values) != 1 or None in values:
            return False
        if self.result is None:
            return True
        if not _is_work(self.expressions[0]) and len(self.expressions) > 1:
            last = _numbers(self.expressions[-1])
            return self.result in (last[-1], evaluate(self.expressions[0]))
        return self.result == values.pop()


@dataclass(frozen=True, slots=True)
class Reading:
    """``had`` and ``has`` by actor (the last word counts), calculations, boxed answer."""

    had: dict[str, int]
    has: dict[str, int]
    calculations: tuple[Calculation, ...]
    boxed: int | None

    @property
    def outcomes(self) -> tuple[int, ...]:
        """What the calculations are said to come to."""
        ends = [calculation.expressions[-1] for calculation in self.calculations]
        results = [c.result for c in self.calculations if c.result is not None]
        return (*results, *(_whole(end) for end in ends if not _is_work(end)))

    @property
    def last_value(self) -> int | None:
        """What the last calculation comes to, as stated."""
        if not self.calculations:
            return None
        last = self.calculations[-1]
        return last.result if last.result is not None else _numbers(last.expressions[-1])[-1]


def evaluate(expression: str) -> int | None:
    """The value of an expression with + - * /; None where it is no whole number."""
    parts = re.findall(rf"{_NUMBER}|{_OPERATOR}", expression)
    terms, sign = [Fraction(_whole(parts[0]))], 1
    for operator, operand in zip(parts[1::2], map(_whole, parts[2::2]), strict=True):
        if operator in _TIMES:
            terms[-1] *= operand
        elif operator in _OVER:
            if operand == 0:
                return None
            terms[-1] /= operand
        else:
            sign = 1 if operator == "+" else -1
            terms.append(Fraction(sign * operand))
    total = sum(terms)
    return int(total) if total == int(total) else None


def read(text: str, actors: Iterable[str]) -> Reading:
    """What ``text`` states about ``actors``."""
    names = "|".join(map(re.escape, actors))
    statement = re.compile(
        rf"\b({names})\s+(?:now |then |still |only )*({_HOLDS})\s+(?:now |still |only )*$"
    )
    boxed = [_whole(found) for found in _BOXED.findall(text)]
    text = _BOXED.sub(" ", text)
    had: dict[str, int] = {}
    has: dict[str, int] = {}
    calculations: list[Calculation] = []
    for chain in _CHAIN.finditer(text):
        expressions = tuple(part.strip() for part in chain.group().split("="))
        lead = statement.search(text[: chain.start()])
        is_relative = re.match(_RELATIVE, text[chain.end() :]) is None
        is_claim = lead is not None and not is_relative
        if lead is not None and is_claim:
            actor, verb = lead.group(1), lead.group(2)
            if verb in _PAST:
                had[actor] = _numbers(expressions[0])[0]
            else:
                has[actor] = _numbers(expressions[-1])[-1]
                if _awaits_result(calculations) and len(expressions) == 1:
                    waiting = calculations[-1]
                    calculations[-1] = Calculation(waiting.expressions, has[actor])
        if any(map(_is_work, expressions)):
            calculations.append(Calculation(expressions, None))
    return Reading(had, has, tuple(calculations), boxed[-1] if boxed else None)


def numbers_in(text: str) -> tuple[int, ...]:
    """All numbers of a text, in order."""
    return _numbers(text)


def _awaits_result(calculations: list[Calculation]) -> bool:
    if not calculations or calculations[-1].result is not None:
        return False
    expressions = calculations[-1].expressions
    return _is_work(expressions[-1])


def _is_work(expression: str) -> bool:
    return re.fullmatch(_NUMBER, expression.strip()) is None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_whole(found) for found in re.findall(_NUMBER, text))


def _whole(text: str) -> int:
    return int(text.replace(",", ""))

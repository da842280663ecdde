r"""Problems with their gold answers, and answers in ``\boxed{...}`` compared with them as numbers.

Knows no model. These rules made the labels: a change to them makes new labels unlike old ones.
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem of GSM8K; ``index`` is its line in the file, counted from 0."""

    index: int
    question: str
    gold_text: str

    @property
    def gold(self) -> float:
        """The answer as a number."""
        return float(self.gold_text)


def load_problems(path: Path) -> list[Problem]:
    """The problems of a JSONL file with ``question`` and ``answer``, in the collection's order."""
    problems = []
    with path.open(encoding="utf-8") as file:
        for index, line in enumerate(file):
            row = json.loads(line)
            gold = row["answer"].rsplit("####", 1)[1].strip().replace(",", "")
            problems.append(Problem(index, row["question"], gold))
    random.Random(0).shuffle(problems)
    return problems


def boxed_contents(text: str) -> list[str]:
    r"""Contents of all balanced ``\boxed{...}`` in the text."""
    contents = []
    for match in re.finditer(r"\\boxed\s*\{", text):
        depth, at = 1, match.end()
        while at < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        if not depth:
            contents.append(text[match.end() : at - 1])
    return contents


def as_number(content: str) -> float | None:
    """The one number that a boxed answer states, or None."""
    text = re.sub(
        r"\\(?:text|mathrm|textbf|mathbf|operatorname)\s*\{[^{}]*\}",
        lambda match: " " + re.sub(r"^\\\w+\s*\{|\}$", "", match.group(0)) + " ",
        content,
    )
    for mark in ("{,}", "\\,", "\\!", "\\$", "$"):
        text = text.replace(mark, "")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    fraction = re.fullmatch(
        r"\s*(-?)\\[dt]?frac\s*\{\s*(-?[\d.]+)\s*\}\s*\{\s*(-?[\d.]+)\s*\}\D*", text
    )
    try:
        if fraction:
            sign = -1 if fraction[1] else 1
            return float(fraction[2]) / float(fraction[3]) * sign
        numbers = re.findall(r"-?(?:\d+\.?\d*|\.\d+)", text)
        if len(numbers) > 1 and "=" in text:
            numbers = re.findall(r"-?(?:\d+\.?\d*|\.\d+)", text.rsplit("=", 1)[1])
        return float(numbers[0]) if len(numbers) == 1 else None
    except (ValueError, ZeroDivisionError):
        return None


def grade(text: str, gold: float) -> tuple[str | None, bool]:
    r"""Content of the last ``\boxed``, or None, and whether it equals the gold answer."""
    contents = boxed_contents(text)
    if not contents:
        return None, False
    number = as_number(contents[-1])
    is_right = number is not None and abs(number - gold) < 1e-6 * max(1.0, abs(gold))
    return contents[-1], is_right

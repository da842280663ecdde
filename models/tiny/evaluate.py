"""Whole-problem accuracy of a network, greedy, and where its first wrong step goes wrong."""

from collections import Counter
from dataclasses import dataclass
from itertools import islice

from specguard.models.tiny import problems
from specguard.models.tiny.data import Coder
from specguard.models.tiny.decoding import greedy
from specguard.models.tiny.network import Network


@dataclass(frozen=True, slots=True)
class Result:
    """How many problems end in the right answer, and the kinds of the first differing steps."""

    num_right: int
    first_errors: dict[str, int]
    wrong: tuple[tuple[problems.Problem, str], ...]


def solve(network: Network, coder: Coder, stream: int, count: int, start: int = 0) -> Result:
    """Solve ``count`` problems of a stream from number ``start`` on."""
    batch = list(islice(problems.stream(stream, start), count))
    network.eval()
    outputs = greedy(network, [coder.prompt(problem) for problem in batch], coder.end)
    network.train()
    right, errors, wrong = 0, Counter[str](), []
    for problem, ids in zip(batch, outputs, strict=True):
        text = coder.tokenizer.decode(ids)
        if text.endswith(f"\\boxed{{{problem.answer}}}."):
            right += 1
        else:
            wrong.append((problem, text))
            errors[first_error(problem, text)] += 1
    return Result(right, dict(errors.most_common()), tuple(wrong))


def first_error(problem: problems.Problem, text: str) -> str:
    """Name of the first difference from the reference: the sentence's kind, and what differs."""
    for index, (wanted, got) in enumerate(
        zip(problem.steps, [*text.split(problems.DELIMITER), *[""] * 20], strict=False)
    ):
        if wanted == got:
            continue
        is_last = index == len(problem.steps) - 1
        kind = problem.question.kind if is_last else problem.sentences[index].kind
        sentence = problem.question.text if is_last else problem.sentences[index].text
        if not got.startswith(sentence):
            return f"{kind}: sentence"
        pieces = zip(wanted[len(sentence) :].split(), got[len(sentence) :].split(), strict=False)
        for position, (right, wrong) in enumerate(pieces):
            if right != wrong:
                is_number = right.strip(",.").isdecimal()
                place = ("look-up" if position == 2 else "number") if is_number else "word"
                return f"{kind}: {place}"
        return f"{kind}: length"
    return "ending"

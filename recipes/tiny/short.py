"""How often the built-in pair is right on short problems of its language, by what they are.

Every phrasing that the language check accepts, alone or in a row of two or three, with small or
large numbers. ``python -m recipes.tiny.short --count 40``
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click
import numpy as np
from scipy.stats import binomtest

import specguard
from specguard import Solver, UsageError, solve_many
from specguard.models.tiny import grammar
from specguard.models.tiny import language as words

SIZES = (30, 80)  # the most that anybody has at first
STREAMS = (words.TRAINING, words.CALIBRATION, words.HELD_OUT)
_NAMES = 3
_DRAWS = 1000


@dataclass(frozen=True, slots=True)
class Short:
    """A problem with its answer; ``size`` is the one of `SIZES` that its numbers are drawn from."""

    text: str
    answer: int
    templates: tuple[str, ...]
    kinds: tuple[str, ...]
    question: str
    size: int


def draw(rng: np.random.Generator, forms: list[grammar.Form], size: int) -> Short | None:
    """A problem in which these phrasings stand in a row, with random words and numbers.

    None where many draws are none: not all phrasings go together.
    """
    for _ in range(_DRAWS):
        text = _text(rng, [form.template for form in forms], size)
        try:
            reading = grammar.read(text)
        except UsageError:
            continue
        assert reading.question is not None
        return Short(
            text,
            reading.question.answer(reading.counts),
            tuple(form.template for form in forms),
            tuple(sentence.kind for sentence in reading.sentences if sentence.updates),
            reading.question.kind,
            size,
        )
    return None


def _text(rng: np.random.Generator, templates: list[str], size: int) -> str:
    language = words.language(STREAMS[int(rng.integers(len(STREAMS)))])
    names = rng.choice(language.names, _NAMES, replace=False).tolist()
    is_money = rng.random() < 0.2
    things = "dollars" if is_money else str(rng.choice(language.things))
    num_known = int(rng.integers(1, len(names)))

    def number(most: int) -> int:
        return int(rng.integers(grammar.LEAST, most + 1))

    def filled(template: str) -> str:
        # A factor has one digit, anything else may be as large as a count.
        most = int(rng.choice([9, size // 2]))
        a, b = rng.choice(names, 2, replace=False).tolist()
        listed = " and ".join([", ".join(names[: num_known - 1]), names[num_known - 1]])
        return template.format(
            a=a,
            b=b,
            n=number(most),
            m=number(9),
            t=things,
            g=rng.choice(language.goods),
            all=listed.removeprefix(" and "),
        )

    facts = [f"{name} has {number(size)} {things}." for name in names[:num_known]]
    events = [filled(template) for template in templates]
    questions = [text for texts in language.questions.values() for text in texts]
    events = [
        f"{rng.choice(language.links)} {text}" if rng.random() < 0.5 else text for text in events
    ]
    return " ".join([*facts, *events, filled(str(rng.choice(questions)))])


def measure(solver: Solver, problems: list[Short], batch_size: int = 32) -> list[bool]:
    """Whether the answer to each problem is right."""
    outcomes = [False] * len(problems)
    for done in solve_many(solver, [problem.text for problem in problems], batch_size=batch_size):
        answer = None if done.solution is None else done.solution.answer
        outcomes[done.index] = answer == str(problems[done.index].answer)
    return outcomes


def sample(rng: np.random.Generator, num_events: int, count: int) -> Iterator[Short]:
    """``count`` problems for each phrasing alone; of several events, as many of random ones."""
    forms = grammar.event_forms()
    for number in range(count * len(forms)):
        row = [forms[number % len(forms)]]
        while len(row) < num_events:
            row.append(forms[int(rng.integers(len(forms)))])
        size = SIZES[int(rng.integers(len(SIZES)))]
        found = draw(rng, row, size)
        if found is not None:
            yield found


def table(title: str, rows: list[tuple[str, bool]]) -> None:
    """Print accuracies by label with 95% Wilson intervals, the worst first."""
    groups: dict[str, list[bool]] = {}
    for label, is_right in rows:
        groups.setdefault(label, []).append(is_right)
    click.echo(f"\n{title}")
    for label, outcomes in sorted(groups.items(), key=lambda item: np.mean(item[1])):
        right, total = sum(outcomes), len(outcomes)
        low, high = binomtest(right, total).proportion_ci(method="wilson")
        click.echo(f"  {right / total:6.1%} ({low:.0%} - {high:.0%}) of {total}  {label}")


@click.command()
@click.option("--count", default=20, show_default=True, help="Problems for each phrasing.")
@click.option("--events", default=3, show_default=True, help="Most events of a problem.")
@click.option("--seed", default=0, show_default=True)
def main(count: int, events: int, seed: int) -> None:
    """Accuracy by number of events, size of the numbers, kind, phrasing and question."""
    solver = specguard.load("tiny", backend="cpu")
    rng = np.random.default_rng(seed)
    views: dict[str, Callable[[Short], tuple[str, ...]]] = {
        "numbers up to": lambda problem: (str(problem.size),),
        "kind of event": lambda problem: tuple(set(problem.kinds)),
        "phrasing": lambda problem: problem.templates,
        "question": lambda problem: (problem.question,),
    }
    for num_events in range(1, events + 1):
        problems = list(sample(rng, num_events, count))
        outcomes = measure(solver, problems)
        rows = list(zip(problems, outcomes, strict=True))
        table(f"{num_events} events", [("all", is_right) for is_right in outcomes])
        for title, view in views.items():
            table(title, [(label, is_right) for p, is_right in rows for label in view(p)])


if __name__ == "__main__":
    main()

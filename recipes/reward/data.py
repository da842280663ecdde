"""Solutions written by the draft as token ids, and for each step whether it is right.

The draft writes whole solutions; the checker labels their steps. Where a step after right ones is
wrong, the solution is also taken up behind the right step in its place, as when a target rewrites
it: so that steps are seen after right prefixes and after the draft's own.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recipes.tiny.checker import judge
from recipes.tiny.data import Coder
from recipes.tiny.decoding import MAX_TOKENS, decode, most_probable, sampler
from recipes.tiny.network import Network
from specguard.models.tiny import problems
from specguard.models.tiny.problems import DELIMITER, Problem

TEMPERATURE = 0.7
_GREEDY_SHARE = 4  # one problem in so many is decoded greedily
_NUM_ROUNDS = 3  # how often a solution is taken up again behind a wrong step
_NUM_PASSES = 2
_BATCH_SIZE = 384  # solutions written at once
_EXCHANGED_SHARE = 0.25
_EXCHANGED_STEPS = 0.35  # steps in which so many tokens are exchanged
_UNKNOWN = -100


@dataclass(frozen=True, slots=True)
class Row:
    """A problem with a solution: ``labels`` as in `RewardNetwork.judge`, ``is_end`` of steps."""

    ids: list[int]
    labels: list[int]
    is_end: list[bool]


@dataclass(slots=True)
class _Solution:
    problem: Problem
    steps: list[str]

    def read(self, text: str, is_cut: bool) -> None:
        """Take in what the draft wrote on; a step that was cut off is none."""
        parts = text.split(DELIMITER)
        self.steps += [part.strip() for part in (parts[:-1] if is_cut else parts) if part.strip()]

    def judgements(self) -> list[bool]:
        return [
            judge(self.problem, self.steps[:index], step).is_right
            for index, step in enumerate(self.steps)
        ]

    def repaired(self, is_right: list[bool]) -> "_Solution | None":
        """The steps up to the first wrong one, with the right one in its place."""
        if all(is_right):
            return None
        wrong = is_right.index(False)
        reference = list(self.problem.steps[: wrong + 1])
        # The reference goes on only from its own steps, and behind the answer nothing does.
        if self.steps[:wrong] != reference[:wrong] or wrong >= len(self.problem.steps) - 1:
            return None
        return _Solution(self.problem, reference)


def write_rows(coder: Coder, draft: Network, first_problem: int, count: int) -> list[Row]:
    """Rows of ``count`` training problems from ``first_problem`` on; the same every time."""
    numbers = range(first_problem, first_problem + count)
    open_ones = [_Solution(problems.generate(problems.TRAINING, number), []) for number in numbers]
    rows = []
    for turn in range(1 + _NUM_ROUNDS):
        _write(coder, draft, open_ones, seed=first_problem * (1 + _NUM_ROUNDS) + turn)
        following = []
        for solution in open_ones:
            is_right = solution.judgements()
            rows.append(make_row(coder, solution.problem, solution.steps, is_right))
            repaired = solution.repaired(is_right)
            if repaired is not None:
                following.append(repaired)
        open_ones = following
    rng = np.random.default_rng(first_problem)
    for number in numbers:
        problem = problems.generate(problems.TRAINING, number)
        changed = _Solution(problem, change_digit(problem, rng))
        rows.append(make_row(coder, problem, changed.steps, changed.judgements()))
    return rows


def change_digit(problem: Problem, rng: np.random.Generator) -> list[str]:
    """The reference's first steps, the last of them with one digit changed behind its sentence.

    The draft's own slips are where it is unsure: from them alone it is learned which steps are
    hard, and not what was written.
    """
    steps = list(problem.steps[: int(rng.integers(1, len(problem.steps) + 1))])
    texts = [*(sentence.text for sentence in problem.sentences), problem.question.text]
    start = len(texts[len(steps) - 1])
    places = [i for i, sign in enumerate(steps[-1]) if i >= start and sign.isdigit()]
    if places:
        place = places[int(rng.integers(len(places)))]
        digit = (int(steps[-1][place]) + int(rng.integers(1, 10))) % 10
        steps[-1] = steps[-1][:place] + str(digit) + steps[-1][place + 1 :]
    return steps


def _write(coder: Coder, draft: Network, solutions: list[_Solution], seed: int) -> None:
    """Have the draft write every solution to its end."""
    greedy = [solution for index, solution in enumerate(solutions) if index % _GREEDY_SHARE == 0]
    others = [solution for index, solution in enumerate(solutions) if index % _GREEDY_SHARE]
    for group, choose in (greedy, most_probable), (others, sampler(TEMPERATURE, seed)):
        prompts = [
            coder.prompt(solution.problem)
            + coder.ids("".join(step + DELIMITER for step in solution.steps))
            for solution in group
        ]
        for solution, ids in zip(
            group, decode(draft, prompts, coder.end, _BATCH_SIZE, choose), strict=True
        ):
            solution.read(coder.tokenizer.decode(ids), is_cut=len(ids) >= MAX_TOKENS)


def make_row(coder: Coder, problem: Problem, steps: list[str], is_right: list[bool]) -> Row:
    """Ids with a separator behind every step; right so far, or not, at every token.

    Inside a wrong step, tokens are labelled from where it leaves the reference, where that is the
    step that the reference has after the same steps; elsewhere its end alone is.
    """
    ids = coder.prompt(problem)
    labels, is_end = [_UNKNOWN] * len(ids), [False] * len(ids)
    for index, (step, right) in enumerate(zip(steps, is_right, strict=True)):
        own = coder.ids(step)
        inner = [1] * len(own)
        if not right:
            inner = [_UNKNOWN] * len(own)
            if tuple(steps[:index]) == problem.steps[:index] and index < len(problem.steps):
                same = _common(own, coder.ids(problem.steps[index]))
                inner = [1] * same + [0] * (len(own) - same)
        ids += [*own, coder.pad]
        labels += [*inner, int(right)]
        is_end += [*([False] * len(own)), True]
    return Row(ids, labels, is_end)


def _common(first: list[int], second: list[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def batches(
    coder: Coder, draft: Network, first_problem: int, tokens: int, pool: int = 512
) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Endless (``token_ids``, ``labels``, ``is_end``, each [B, T], first problem of the next pool).

    Each pool of problems is sorted by length and cut into batches of about ``tokens`` tokens, which
    come twice: writing takes the draft as long as training on it takes.
    """
    while True:
        rows = write_rows(coder, draft, first_problem, pool)
        rows.sort(key=lambda row: len(row.ids))
        groups: list[list[Row]] = [[]]
        for row in rows:
            if (len(groups[-1]) + 1) * len(row.ids) > tokens:
                groups.append([])
            groups[-1].append(row)
        rng = np.random.default_rng(first_problem)
        order = [index for _ in range(_NUM_PASSES) for index in rng.permutation(len(groups))]
        first_problem += pool
        for index in order:
            yield (*pad(groups[index], coder.pad), first_problem)


def replaced_batches(
    coder: Coder, first_problem: int, tokens: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Endless (``token_ids``, ``labels``, ``is_end``, ``written``, each [B, T]), tokens exchanged.

    ``written`` are the reference's ids, -100 in the prompt. ``labels`` are 0 where a token was
    exchanged for another of its class, 1 where it was not. In what the draft writes wrong tokens
    are too rare to learn from them to compare a token with what is predicted for it.
    """
    lexicon = coder.lexicon
    classes = np.array(lexicon.class_of)
    is_known = ~np.array(lexicon.is_unused)
    members = [np.flatnonzero((classes == c) & is_known) for c in range(lexicon.num_classes)]
    while True:
        rng = np.random.default_rng(first_problem)
        rows: list[Row] = []
        references: list[Row] = []
        while sum(len(row.ids) for row in rows) < tokens:
            problem = problems.generate(problems.TRAINING, first_problem)
            first_problem += 1
            row = make_row(coder, problem, list(problem.steps), [True] * len(problem.steps))
            pairs = zip(row.ids, row.labels, strict=True)
            known = [_UNKNOWN if label == _UNKNOWN else token for token, label in pairs]
            references.append(Row(known, row.labels[:], row.is_end))
            num_ends = np.cumsum(row.is_end)
            share = _EXCHANGED_SHARE * (rng.random(num_ends[-1] + 1) < _EXCHANGED_STEPS)
            for place in np.flatnonzero(rng.random(len(row.ids)) < share[num_ends]).tolist():
                others = members[classes[row.ids[place]]]
                if row.labels[place] == _UNKNOWN or row.is_end[place] or not len(others):
                    continue
                token = int(rng.choice(others))
                row.labels[place] = int(token == row.ids[place])
                row.ids[place] = token
            rows.append(row)
        written, _, _ = pad(references, _UNKNOWN)
        yield (*pad(rows, coder.pad), written)


def pad(rows: list[Row], filler: int) -> tuple[Tensor, Tensor, Tensor]:
    """``token_ids``, ``labels`` and ``is_end``, each [B, T]."""
    token_ids = [torch.tensor(row.ids) for row in rows]
    labels = [torch.tensor(row.labels) for row in rows]
    is_end = [torch.tensor(row.is_end) for row in rows]
    return (
        pad_sequence(token_ids, True, filler),
        pad_sequence(labels, True, _UNKNOWN),
        pad_sequence(is_end, True, False),
    )

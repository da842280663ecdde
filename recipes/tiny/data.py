"""Problems as token ids: prompts, labelled rows, and batches of like length."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from recipes.tiny.lexicon import Lexicon, build_lexicon
from recipes.tiny.tokenizer import END, PAD, build_tokenizer, prompt_text
from specguard.models.tiny import language, problems

_TEXTS = 3000  # problems that show every piece of text there is


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of a text, and for each whether it is learned."""

    ids: list[int]
    learned: list[bool]


@dataclass(frozen=True, slots=True)
class Coder:
    """Texts to ids, and the lexicon of the ids."""

    tokenizer: PreTrainedTokenizerFast
    lexicon: Lexicon
    end: int
    pad: int

    def prompt(self, problem: problems.Problem) -> list[int]:
        """Ids up to where the solution begins."""
        return self.ids(prompt_text(problem.text))

    def row(self, problem: problems.Problem) -> Row:
        """Ids of prompt, solution and end; all but the prompt is learned."""
        prompt, solution = self.prompt(problem), [*self.ids(problem.solution), self.end]
        return Row([*prompt, *solution], [False] * len(prompt) + [True] * len(solution))

    def pieces(self, pieces: list[tuple[str, bool]]) -> Row:
        """Ids of pieces of text, those of the second kind to be learned."""
        ids: list[int] = []
        learned: list[bool] = []
        for text, is_learned in pieces:
            found = self.ids(text)
            ids += found
            learned += [is_learned] * len(found)
        return Row(ids, learned)

    def ids(self, text: str) -> list[int]:
        """Ids of a text, as they are anywhere in a longer one that is cut at its pieces."""
        ids: list[int] = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def make_coder() -> Coder:
    """The pair's tokenizer and lexicon; always the same."""
    texts = []
    for index in range(_TEXTS):
        problem = problems.generate(problems.TRAINING, index)
        texts += ["system\nuser\nassistant\n", problem.text, problem.solution]
    names, things = _names_and_things()
    tokenizer = build_tokenizer(texts, names | things)
    seen = language.language(problems.TRAINING)
    unseen = (names | things) - {*seen.names, *seen.things}
    vocabulary = tokenizer.get_vocab()
    lexicon = build_lexicon(vocabulary, names, things, unseen)
    return Coder(tokenizer, lexicon, vocabulary[END], vocabulary[PAD])


def _names_and_things() -> tuple[set[str], set[str]]:
    """Those of every use: held-out ones are tokens like the others."""
    streams = problems.TRAINING, problems.CALIBRATION, problems.HELD_OUT
    uses = [language.language(stream) for stream in streams]
    names = {name for use in uses for name in use.names}
    return names, {thing for use in uses for thing in use.things}


def batches(
    coder: Coder,
    source: Callable[[int], Row],
    first_problem: int,
    tokens: int,
    pool: int = 512,
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Endless (``token_ids`` [B, T], ``labels`` [B, T] with -100 where nothing is learned, next).

    Each pool of problems is sorted by length and cut into batches of about ``tokens`` tokens; the
    third value is the first problem of the next pool.
    """
    while True:
        rows = [source(first_problem + i) for i in range(pool)]
        rows.sort(key=lambda row: len(row.ids))
        groups: list[list[Row]] = [[]]
        for row in rows:
            if (len(groups[-1]) + 1) * len(row.ids) > tokens:
                groups.append([])
            groups[-1].append(row)
        order = np.random.default_rng(first_problem).permutation(len(groups))
        first_problem += pool
        for index in order.tolist():
            yield (*pad(groups[index], coder.pad), first_problem)


def pad(rows: list[Row], filler: int) -> tuple[Tensor, Tensor]:
    """``token_ids`` [B, T] and ``labels`` [B, T], -100 where nothing is learned."""
    token_ids = [torch.tensor(row.ids) for row in rows]
    labels = [
        ids.where(torch.tensor(row.learned), -100) for ids, row in zip(token_ids, rows, strict=True)
    ]
    return pad_sequence(token_ids, True, filler), pad_sequence(labels, True, -100)

"""A model that looks two tokens back: fast enough to solve thousands of problems with.

Two of one seed and different noise agree often, but not always, on the next token.
"""

from collections.abc import Sequence

import numpy as np

from tests.reference import Pass, ReferenceEngine


class Bigrams:
    num_layers = 3

    def __init__(self, seed: int, noise: int, vocab_size: int) -> None:
        size = (vocab_size, vocab_size)
        self.first = np.random.default_rng(seed).normal(scale=2.0, size=size)
        self.second = np.random.default_rng([seed, noise]).normal(scale=0.5, size=size)

    def __call__(self, token_ids: Sequence[int]) -> Pass:
        last = np.array(token_ids)
        before = np.concatenate([[0], last[:-1]])
        width = len(last)
        weights = np.tril(1.0 / (1 + np.abs(np.subtract.outer(np.arange(width), np.arange(width)))))
        weights /= weights.sum(-1, keepdims=True)
        states = np.eye(len(self.first))[last]
        return Pass(
            self.first[last] + self.second[before], states, [weights[np.newaxis]] * self.num_layers
        )


def bigram_engine(seed: int = 1, noise: int = 0, vocab_size: int = 128) -> ReferenceEngine:
    engine = ReferenceEngine(seed, model=Bigrams(seed, noise, vocab_size))  # type: ignore[arg-type]
    engine.num_tokens = vocab_size
    return engine

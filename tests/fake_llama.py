"""llama.cpp's contexts in plain NumPy: cells, sequences, and the rules that it refuses batches by.

What a sequence has before a token is computed anew for every token.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from specguard.backends.llamacpp.context import Decoded, Microbatch
from specguard.backends.llamacpp.layer import LlamaLayer
from specguard.backends.local.engine import LocalEngine
from specguard.backends.tokenizer import FolderTokenizer
from tests.reference import Llama, Pass

MICROBATCH = 5  # so that passes are cut in places of all kinds


class FakeContext:
    """As llama.cpp's; a token that is no number spoils all cells, as it does there."""

    def __init__(self, model: "FakeModel", num_cells: int) -> None:
        self._model, self.num_cells = model, num_cells
        self._token_ids: dict[int, int] = {}  # by cell
        self._paths: dict[int, list[int]] = {}  # cells, by sequence
        self._is_spoiled = False
        self._random = np.random.default_rng(0)

    @property
    def used(self) -> set[int]:
        return {cell for path in self._paths.values() for cell in path}

    def copy(self, source: int, target: int, length: int) -> None:
        assert not self._paths.get(target)
        self._paths[target] = self._paths[source][:length]

    def cut(self, sequence: int, length: int) -> None:
        self._paths[sequence] = self._paths.get(sequence, [])[:length]

    def grow(self, num_cells: int) -> None:
        places = {cell: place for place, cell in enumerate(sorted(self.used))}
        self._token_ids = {place: self._token_ids[cell] for cell, place in places.items()}
        self._paths = {
            sequence: [places[cell] for cell in path] for sequence, path in self._paths.items()
        }
        self.num_cells = num_cells

    def decode(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[Sequence[int]],
        is_wanted: Sequence[bool],
        first_layer: int | None = None,
    ) -> Decoded:
        self._check_coupled(sequences)
        # Where new tokens go is nobody's business but llama.cpp's.
        free = self._random.permutation(sorted(set(range(self.num_cells)) - self.used))
        cells = free[: len(token_ids)]
        assert len(cells) == len(token_ids), "too few cells"
        paths = []
        for cell, token_id, position, numbers in zip(
            cells, token_ids, positions, sequences, strict=True
        ):
            self._token_ids[cell] = token_id
            for number in numbers:
                path = self._paths.setdefault(number, [])
                assert len(path) == position, "positions of a sequence are consecutive"
                path.append(int(cell))
            paths.append(tuple(self._paths[numbers[0]]))
        seen: list[tuple[tuple[int, ...], Pass]] = []
        logits, hidden, rows = [], [], []
        for path in reversed(paths):  # the longest ones first, of which others are beginnings
            whole = next((each for longer, each in seen if longer[: len(path)] == path), None)
            if whole is None:
                whole = self._model.llama([self._token_ids[cell] for cell in path])
                seen.append((path, whole))
            last = len(path) - 1
            self._is_spoiled |= not np.isfinite(whole.hidden).all()
            logits.append(whole.logits[last] * (np.nan if self._is_spoiled else 1))
            hidden.append(whole.hidden[last] * (np.nan if self._is_spoiled else 1))
            weights = np.zeros((len(whole.attention), self._model.llama.num_heads, self.num_cells))
            weights[..., path] = [layer[:, last, : last + 1] for layer in whole.attention]
            rows.append(weights)
        for each in logits, hidden, rows:
            each.reverse()
        wanted = np.flatnonzero(is_wanted)
        return Decoded(
            np.array(logits, dtype=np.float32)[wanted],
            np.array(hidden, dtype=np.float32)[wanted],
            cells,
            [self._microbatch(rows[start : start + MICROBATCH], first_layer)
             for start in range(0, len(rows), MICROBATCH)],
        )  # fmt: skip

    def _microbatch(self, rows: list[np.ndarray], first_layer: int | None) -> Microbatch:
        stacked = np.array(rows, dtype=np.float32).transpose(1, 2, 0, 3)
        kept = range(first_layer, len(stacked)) if first_layer is not None else ()
        return Microbatch(len(rows), {layer: stacked[layer] for layer in kept})

    def _check_coupled(self, sequences: Sequence[Sequence[int]]) -> None:
        for numbers in sequences:
            lengths = {len(self._paths.get(number, ())) for number in numbers}
            assert len(lengths) == 1, "sequences that share a token are as long"
        for number in {number for numbers in sequences for number in numbers}:
            shared = set.intersection(*(set(each) for each in sequences if number in each))
            assert shared, "sequences that have parted do not meet again"


class FakeModel:
    """The weights of a checkpoint."""

    num_bytes_per_token = 1

    def __init__(self, name: str, llama: Llama) -> None:
        self.name, self.llama, self.num_layers = name, llama, llama.num_layers
        self.contexts: list[FakeContext] = []

    def open_context(self, num_cells: int) -> FakeContext:
        self.contexts.append(FakeContext(self, num_cells))
        return self.contexts[-1]


def load(folder: Path, context_limit: int = 512) -> LocalEngine:
    """An engine over the fake."""
    tokenizer = FolderTokenizer(folder)
    num_tokens = max(tokenizer.vocabulary.values()) + 1
    layer = LlamaLayer(FakeModel(str(folder), Llama.load(folder)), num_tokens)
    return LocalEngine(str(folder), layer, tokenizer, context_limit)

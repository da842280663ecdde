"""What the passes said of the tokens that were drawn, kept until a candidate is finished.

Where passes are small, many are described in one go: a few large operations cost less than many
small ones. Knows nothing of rows and of when a step ends.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from specguard.backends.local.layer import Array, Outputs, TensorLayer
from specguard.core.engine import FloatArray


@dataclass(slots=True, eq=False)
class _Pass:
    """One token of each candidate in ``numbers``, by the rows ``owners`` of hidden states."""

    numbers: list[int]
    owners: list[int]
    hidden: Array | None


@dataclass(frozen=True, slots=True)
class _Described:
    """Log-probabilities and entropies of the tokens of some passes, as long as these."""

    passes: list[_Pass]
    logprobs: Array
    entropies: Array


@dataclass(frozen=True, slots=True)
class Drawn:
    """Of some candidates: for each token [N] its candidate's place, log-probability and entropy.

    ``hidden_sums`` [candidates, H] are of the states that predicted the tokens, if they were kept.
    """

    owners: NDArray[np.integer]
    logprobs: FloatArray
    entropies: FloatArray
    hidden_sums: FloatArray | None


class DrawLog:
    """Candidates go by numbers that are never used again."""

    def __init__(self, layer: TensorLayer, keeps_hidden: bool) -> None:
        self._layer, self._keeps_hidden = layer, keeps_hidden
        self._waiting: list[tuple[_Pass, Array, Array]] = []  # with logits and token ids
        self._num_waiting = 0
        self._described: list[_Described] = []

    def add(
        self, numbers: list[int], owners: list[int], outputs: Outputs, token_ids: Array
    ) -> None:
        """One token of each candidate, drawn from the row ``owners`` of the outputs."""
        hidden = outputs.hidden if self._keeps_hidden else None
        self._waiting.append((_Pass(numbers, owners, hidden), outputs.logits, token_ids))
        rows, width = outputs.logits.shape
        self._num_waiting += rows * width
        if self._num_waiting > self._layer.most_waiting_logits:
            self.describe()

    def newest(self) -> FloatArray:
        """Log-probabilities of the tokens of the last pass, which were described."""
        part = self._described[-1]
        return self._layer.numpy(part.logprobs)[-len(part.passes[-1].numbers) :]

    def take(self, numbers: Sequence[int], others: Collection[int]) -> Drawn:
        """What was drawn for some candidates; only that of ``others`` is kept from then on."""
        self.describe()
        places = {number: place for place, number in enumerate(numbers)}
        layer, kept = self._layer, self._described
        self._described = [
            part
            for part in kept
            if any(number in others for drawn in part.passes for number in drawn.numbers)
        ]
        owners = np.array(
            [places.get(n, -1) for part in kept for drawn in part.passes for n in drawn.numbers]
        )
        is_own = owners >= 0
        sums = None
        if self._keeps_hidden:
            passes = [drawn for part in kept for drawn in part.passes]
            firsts = accumulate(
                (len(drawn.hidden) for drawn in passes if drawn.hidden is not None), initial=0
            )
            rows = [
                first + owner
                for first, drawn in zip(firsts, passes, strict=False)
                for owner in drawn.owners
            ]
            own_rows = [row for row, own in zip(rows, is_own, strict=True) if own]
            sums = layer.sums(
                [drawn.hidden for drawn in passes], own_rows, owners[is_own].tolist(), len(numbers)
            )
        return Drawn(
            owners[is_own],
            np.concatenate([layer.numpy(part.logprobs) for part in kept])[is_own],
            np.concatenate([layer.numpy(part.entropies) for part in kept])[is_own],
            sums,
        )

    def describe(self) -> None:
        """Have all that waits described."""
        if not self._waiting:
            return
        waiting, self._waiting, self._num_waiting = self._waiting, [], 0
        described = self._layer.describe(
            [(logits, drawn.owners, token_ids) for drawn, logits, token_ids in waiting]
        )
        self._described.append(_Described([drawn for drawn, _, _ in waiting], *described))

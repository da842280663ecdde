"""What decoding keeps from token to token: sequences, candidates' columns, what was drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from specguard.backends.mlx.attention import Row
from specguard.backends.mlx.kv import KVBuffer
from specguard.backends.mlx.sampling import describe, draw, warp
from specguard.backends.sequence import BufferedSequence
from specguard.backends.verbs import Draft
from specguard.core.model import FloatArray, Sampling

CHUNK = 128  # rows of logits that exist at a time


class Next(NamedTuple):
    """What a pass says of the token after it: final hidden states [N, H] and logits [N, V]."""

    hidden: mx.array
    logits: mx.array

    def take(self, slots: list[int]) -> "Next":
        """Some of its rows, or itself where they are all."""
        if slots == list(range(len(self.hidden))):
            return self
        wanted = mx.array(slots)
        return Next(self.hidden[wanted], self.logits[wanted])


class MlxSequence(BufferedSequence[KVBuffer]):
    """A sequence; ``ahead`` is what is known of its next token, the pending column then written."""

    ahead: Next | None = None

    def close(self) -> None:
        """Give the KV back."""
        super().close()
        self.ahead = None

    def append(self, token_ids: Sequence[int]) -> None:
        """Take tokens in; their columns, the last one's apart, are in the buffer already."""
        super().append(token_ids)
        self.ahead = None

    def truncate(self, length: int) -> None:
        """Drop the tokens from ``length`` on; their columns are overwritten in time."""
        super().truncate(length)
        self.ahead = None


@dataclass(slots=True)
class Handle:
    """Where a candidate's KV lies behind its sequence, and what is known of what follows it.

    ``columns`` belong to the places from ``start`` on. ``distributions`` [n, V] are the warped
    ones, if they were kept.
    """

    sequence: MlxSequence
    version: int
    start: int
    columns: list[int]
    ahead: Next | None = None
    distributions: mx.array | None = None


@dataclass(slots=True)
class CandidateColumns:
    """Which column behind a sequence belongs to which of its candidates while they are drawn."""

    sequence: MlxSequence
    num_candidates: int
    owners: list[int] = field(default_factory=list)  # of each column after the pending one

    def row(self, drafts: Sequence[Draft], numbers: Sequence[int]) -> Row:
        """A slot for the newest token of these candidates, by number, which get a column each."""
        first = len(self.sequence.token_ids)
        start = first + len(self.owners)
        for offset, draft in enumerate(drafts):
            draft.columns.append(start + offset)
        self.owners.extend(numbers)
        row = Row(self.sequence.writable(), start, num_slots=len(drafts))
        if self.num_candidates > 1:
            is_own = mx.array(self.owners) == mx.array(numbers)[:, None]
            shared = mx.ones((len(drafts), first), mx.bool_)
            row.mask = mx.concatenate([shared, is_own], axis=1)
        return row


def slot_row(buffer: KVBuffer, start: int, num_slots: int, length: int) -> Row:
    """A row of slots of ``length`` tokens each, causal and blind for one another."""
    row = Row(buffer, start, num_slots, length)
    if num_slots > 1:
        slot, place = np.divmod(np.arange(num_slots * length), length)
        is_own = (slot == slot[:, None]) & (place <= place[:, None])
        shared = np.ones((num_slots * length, start), dtype=np.bool_)
        row.mask = mx.array(np.concatenate([shared, is_own], axis=1))
    return row


class Trail:
    """What was drawn, token by token, described before the pass over the token begins.

    So nothing at the end of a step waits for the pass that is under way then.
    """

    def __init__(self) -> None:
        self._num_forgotten = 0
        self._alive: list[list[int]] = []
        self._described: list[tuple[mx.array, mx.array]] = []
        self._hidden: list[mx.array] = []
        self._kept: dict[int, list[mx.array]] = {}

    @property
    def num_passes(self) -> int:
        """Passes so far, the forgotten ones among them."""
        return self._num_forgotten + len(self._alive)

    def add(
        self, alive: list[int], token_ids: mx.array, following: Next, probs: mx.array | None
    ) -> None:
        """One token of each candidate in ``alive`` and what it was drawn from, [A, ...] all.

        Their computation begins.
        """
        self._alive.append(alive)
        described = describe(following.logits, token_ids)
        hidden = following.hidden.astype(mx.float32)
        mx.async_eval(token_ids, described, hidden)
        self._described.append(described)
        self._hidden.append(hidden)
        if probs is not None:
            for slot, index in enumerate(alive):
                self._kept.setdefault(index, []).append(probs[slot])
            # A lazy array belongs to its thread; the next call may come from another.
            mx.async_eval([self._kept[index][-1] for index in alive])

    def take(
        self, numbers: list[int], first_pass: int
    ) -> tuple[NDArray[np.integer], FloatArray, FloatArray, FloatArray]:
        """What was drawn for some candidates, none of it before ``first_pass``.

        Returns:
            For each token [N] the place of its candidate among ``numbers``, its log-probability and
            its entropy; and sums [numbers, H] of the hidden states that predicted them.
        """
        first = first_pass - self._num_forgotten
        places = {number: place for place, number in enumerate(numbers)}
        owners = np.array(
            [places.get(index, -1) for alive in self._alive[first:] for index in alive]
        )
        is_mine = owners >= 0
        logprobs, entropies = (
            np.concatenate([np.array(part) for part in parts])[is_mine]
            for parts in zip(*self._described[first:], strict=True)
        )
        hidden = np.concatenate([np.array(states) for states in self._hidden[first:]])[is_mine]
        sums = np.zeros((len(numbers), hidden.shape[1]), dtype=np.float32)
        np.add.at(sums, owners[is_mine], hidden)
        return owners[is_mine], logprobs, entropies, sums

    def distributions(self, number: int) -> mx.array | None:
        """What a candidate's tokens were drawn from, [n, V], if it was kept; it is given away."""
        kept = self._kept.pop(number, None)
        if kept is None:
            return None
        stacked = mx.stack(kept)
        mx.async_eval(stacked)
        return stacked

    def forget(self, first_pass: int) -> None:
        """Drop what was drawn before a pass."""
        num_passes = first_pass - self._num_forgotten
        self._num_forgotten += num_passes
        for passes in self._alive, self._described, self._hidden:
            del passes[:num_passes]


def draw_tokens(
    following: Next, slots: list[int], sampling: Sampling, uniforms: FloatArray, needs_probs: bool
) -> tuple[mx.array, Next, mx.array | None]:
    """A token for each slot of ``following``, these slots, and their warped distributions."""
    # Candidates share their first distribution: it is warped before they part.
    probs = warp(following.logits, sampling) if needs_probs else None
    taken = following.take(slots)
    if taken is not following and probs is not None:
        probs = probs[mx.array(slots)]
    following = taken
    if probs is None or sampling.is_greedy:
        return mx.argmax(following.logits, axis=-1), following, probs
    return draw(probs, mx.array(uniforms)), following, probs


def to_numpy(array: mx.array) -> FloatArray:
    """The array in single precision, once it is computed."""
    found: FloatArray = np.array(array.astype(mx.float32))
    return found


def offset(positions: list[int]) -> int | mx.array:
    """Positions as a model takes them: one number where they are equal."""
    return positions[0] if len(set(positions)) == 1 else mx.array(positions)

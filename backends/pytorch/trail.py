"""What the passes of a drafting said of the tokens that were drawn, kept until these are needed.

Where passes are small, log-probabilities and entropies of many are worked out in one go: a few
large operations cost less than many small ones. Knows nothing of rows and of when a step ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specguard.backends.pytorch.sampling import describe
from specguard.core.model import FloatArray

_MOST_LOGITS = 2**16  # numbers that wait to be described; larger passes are described at once


@dataclass(frozen=True, slots=True)
class _Pass:
    """One token [N] of each candidate in ``alive``.

    ``owners`` [N] are rows of ``hidden`` [A, H] and ``probs`` [A, V].
    """

    alive: list[int]
    owners: list[int]
    token_ids: Tensor
    hidden: Tensor
    probs: Tensor | None


class Trail:
    """The passes so far. Passes are numbered from the first one ever."""

    def __init__(self) -> None:
        self._passes: list[_Pass] = []
        self._num_forgotten = 0
        self._described: list[tuple[Tensor, Tensor]] = []  # of the first passes
        self._logits: list[Tensor] = []  # [A, V] of the others

    @property
    def num_passes(self) -> int:
        """Passes so far, the forgotten ones among them."""
        return self._num_forgotten + len(self._passes)

    def add(
        self,
        alive: list[int],
        owners: list[int],
        token_ids: Tensor,
        logits: Tensor,
        hidden: Tensor,
        probs: Tensor | None,
    ) -> None:
        """A pass: of each candidate the token [N] and its row [N] in what was found [A, ...]."""
        self._passes.append(_Pass(alive, owners, token_ids, hidden, probs))
        self._logits.append(logits)
        if sum(one.numel() for one in self._logits) > _MOST_LOGITS:
            self._describe()

    def take(
        self, numbers: Sequence[int], first_pass: int
    ) -> tuple[NDArray[np.integer], FloatArray, FloatArray, FloatArray]:
        """What was drawn for some candidates, none of it before ``first_pass``.

        Returns:
            For each token [N] the place of its candidate among ``numbers``, its log-probability and
            its entropy; and sums [numbers, H] of the hidden states that predicted them.
        """
        self._describe()
        first = first_pass - self._num_forgotten
        passes, described = self._passes[first:], self._described[first:]
        places = {number: place for place, number in enumerate(numbers)}
        # Their tokens among all that were drawn, and the rows that these came from.
        mine, owners, sources = [], [], []
        num_drawn = num_rows = 0
        for one in passes:
            for offset, (number, owner) in enumerate(zip(one.alive, one.owners, strict=True)):
                if number in places:
                    mine.append(num_drawn + offset)
                    owners.append(places[number])
                    sources.append(num_rows + owner)
            num_drawn += len(one.alive)
            num_rows += len(one.hidden)
        hidden = torch.cat([one.hidden for one in passes])
        device = hidden.device
        sums = hidden.new_zeros(len(numbers), hidden.shape[1], dtype=torch.float32)
        states = hidden[torch.tensor(sources, device=device)].float()
        sums.index_add_(0, torch.tensor(owners, device=device), states)
        logprobs, entropies = (
            torch.cat(parts).cpu().numpy() for parts in zip(*described, strict=True)
        )
        return np.array(owners), logprobs[mine], entropies[mine], sums.cpu().numpy()

    def distributions(self, number: int) -> Tensor | None:
        """What a candidate's tokens were drawn from, [n, V], if it was kept."""
        kept = [
            one.probs[one.owners[one.alive.index(number)]]
            for one in self._passes
            if one.probs is not None and number in one.alive
        ]
        return torch.stack(kept) if kept else None

    def forget(self, first_pass: int) -> None:
        """Drop all passes before this one."""
        if first_pass > self._num_forgotten:
            self._describe()
            count = first_pass - self._num_forgotten
            del self._passes[:count], self._described[:count]
            self._num_forgotten = first_pass

    def _describe(self) -> None:
        """Describe the passes that wait for it, and let their logits go."""
        logits, self._logits = self._logits, []
        if not logits:
            return
        waiting = self._passes[-len(logits) :]
        firsts = accumulate(map(len, logits), initial=0)
        rows = [
            first + owner
            for first, one in zip(firsts, waiting, strict=False)
            for owner in one.owners
        ]
        is_plain = rows == list(range(sum(map(len, logits))))
        found = describe(
            logits[0] if len(logits) == 1 else torch.cat(logits),
            torch.cat([one.token_ids for one in waiting]),
            None if is_plain else torch.tensor(rows, device=logits[0].device),
        )
        sizes = [len(one.alive) for one in waiting]
        self._described += zip(*(part.split(sizes) for part in found), strict=True)

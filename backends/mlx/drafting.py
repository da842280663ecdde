"""Drawing candidates token by token, for sequences that come and go.

It runs one pass ahead: while Python reads a token and looks for the step's end, the pass over that
token is under way. The pass over the last token of a step is kept for the next step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from specguard.backends.mlx.decoding import (
    CandidateColumns,
    Handle,
    MlxSequence,
    Next,
    Trail,
    draw_tokens,
    offset,
)
from specguard.backends.mlx.forward import Forward
from specguard.backends.verbs import (
    Draft,
    OpenDrafts,
    check_room,
    check_sequences,
    finish_candidates,
)
from specguard.core.model import Boundary, Candidate, FloatArray, Sampling, Tokenizer
from specguard.core.text import PieceTable


@dataclass(slots=True, eq=False)
class _Row:
    """A sequence, its candidates by number, and the columns that they take behind it."""

    sequence: MlxSequence
    columns: CandidateColumns
    drafts: dict[int, Draft]
    first_pass: int
    version: int = 0  # of the sequence while it is drawn for

    @property
    def is_done(self) -> bool:
        """Whether all candidates are."""
        return all(draft.finish is not None for draft in self.drafts.values())


class MlxDrafting:
    """A `Drafting` on MLX; ``after_pending`` forwards pending tokens where that is not done yet."""

    def __init__(
        self,
        name: str,
        forward: Forward,
        after_pending: Callable[[Sequence[MlxSequence]], Next],
        tokenizer: Tokenizer,
        pieces: PieceTable,
        context_limit: int,
        num_candidates: int,
        sampling: Sampling,
        keep_distributions: bool,
    ) -> None:
        self._name, self._forward, self._after_pending = name, forward, after_pending
        self._tokenizer, self._context_limit = tokenizer, context_limit
        self._num_candidates, self._sampling = num_candidates, sampling
        self._keeps_distributions = keep_distributions
        self._rows: list[_Row] = []
        self._joining: list[_Row] = []
        self._open = OpenDrafts(pieces, num_candidates)
        self._alive: list[int] = []
        self._slots: list[int] = []  # of what follows, for each candidate in ``alive``
        self._following: Next | None = None
        self._ahead: dict[int, Next] = {}
        self._trail = Trail()

    def add(self, sequence: MlxSequence, boundary: Boundary, uniforms: FloatArray) -> None:
        """A sequence joins."""
        check_room(sequence, boundary.max_tokens, self._context_limit)
        check_sequences([sequence, *(row.sequence for row in self._rows + self._joining)])
        sequence.readable()
        drafts = self._open.add(boundary, uniforms)
        sequence.version += 1  # the columns behind the sequence are about to be written
        columns = CandidateColumns(sequence, self._num_candidates)
        self._joining.append(_Row(sequence, columns, drafts, self._trail.num_passes))

    def run(self, num_wanted: int) -> list[tuple[MlxSequence, list[Candidate]]]:
        """Draw on until so many more sequences, or all, have their candidates."""
        done: list[_Row] = []
        with self._forward.memory_errors():
            while (self._rows or self._joining) and len(done) < num_wanted:
                if self._joining:
                    self._join()
                self._draw()
                done += [row for row in self._rows if row.is_done]
                self._rows = [row for row in self._rows if not row.is_done]
            found = self._finished(done)
        if not self._rows:  # whoever waits for others to join holds no memory
            self._following = None
        return found

    def _join(self) -> None:
        joining, self._joining = self._joining, []
        following = self._after_pending([row.sequence for row in joining])
        first = 0
        if self._alive:
            assert self._following is not None
            first = len(self._following.logits)
            pairs = zip(self._following, following, strict=True)
            following = Next(*(mx.concatenate(pair) for pair in pairs))
        for slot, row in enumerate(joining, first):
            row.version = row.sequence.version
            self._slots += [slot] * self._num_candidates
            self._alive += row.drafts
        self._rows += joining
        self._following = following

    def _draw(self) -> None:
        """A token for each unfinished candidate, and the pass over those tokens."""
        assert self._following is not None
        alive, drafts = self._alive, self._open.drafts
        needs_probs = self._keeps_distributions or not self._sampling.is_greedy
        token_ids, drawn_from, probs = draw_tokens(
            self._following, self._slots, self._sampling, self._open.uniforms(alive), needs_probs
        )
        self._trail.add(alive, token_ids, drawn_from, probs if self._keeps_distributions else None)
        following, is_last = drawn_from, self._open.is_last(alive)
        if not is_last:
            following = self._decode(token_ids)
            mx.async_eval(following)
        self._slots, self._alive = [], []
        # Only here Python waits, for the token alone: the pass over it is under way.
        for slot, (index, token_id) in enumerate(zip(alive, token_ids.tolist(), strict=True)):
            if drafts[index].take(token_id):
                self._slots.append(slot)
                self._alive.append(index)
            elif not is_last:
                self._ahead[index] = following.take([slot])
                # A lazy array belongs to its thread; the next step may run in another.
                mx.async_eval(self._ahead[index])
        self._following = following

    def _decode(self, token_ids: mx.array) -> Next:
        """Forward the newest token of every unfinished candidate."""
        rows, positions = [], []
        for row in self._rows:
            drafts = list(row.drafts.values())
            mine = [place for place, draft in enumerate(drafts) if draft.finish is None]
            own = [drafts[place] for place in mine]
            position = len(row.sequence.token_ids) + len(own[0].token_ids)
            positions += [position] * len(mine)
            rows.append(row.columns.row(own, mine))
        hidden = self._forward.run(rows, token_ids[:, None], offset(positions))[:, 0]
        return Next(hidden, self._forward.logits(hidden))

    def _finished(self, rows: Sequence[_Row]) -> list[tuple[MlxSequence, list[Candidate]]]:
        """The candidates of rows that are done."""
        if not rows:
            return []
        drafts = {number: draft for row in rows for number, draft in row.drafts.items()}
        drawn = self._trail.take(list(drafts), min(row.first_pass for row in rows))
        handles = [
            Handle(
                sequence=row.sequence,
                version=row.version,
                start=len(row.sequence.token_ids),
                columns=draft.columns,
                ahead=self._ahead.pop(number, None),
                distributions=self._trail.distributions(number),
            )
            for row in rows
            for number, draft in row.drafts.items()
        ]
        candidates = finish_candidates(
            self._name, self._tokenizer, list(drafts.values()), *drawn, handles
        )
        self._open.drop(drafts)
        known = self._trail.num_passes
        self._trail.forget(min((row.first_pass for row in self._rows), default=known))
        k = self._num_candidates
        return [
            (row.sequence, candidates[place * k : (place + 1) * k])
            for place, row in enumerate(rows)
        ]

"""Drawing candidates token by token, for sequences that come and go.

Each sequence is a row of one buffer and its candidates are branches of that row. Who is done
leaves, who comes joins the passes under way: the rows are then laid out anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

import torch

from specguard.backends.pytorch.branching import Branches, moved
from specguard.backends.pytorch.forward import Forward, Layout
from specguard.backends.pytorch.kv import Handle, KVBuffer, Part, TorchSequence
from specguard.backends.pytorch.sampling import sample, warp
from specguard.backends.pytorch.trail import Trail
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
    """A sequence, its candidates by number, and where in which buffer they are."""

    sequence: TorchSequence
    version: int  # of the sequence while it is drawn for
    drafts: dict[int, Draft]
    first_pass: int
    buffer: KVBuffer | None = None
    place: int = 0

    @property
    def num_held(self) -> int:
        """Columns of the sequence itself."""
        return self.sequence.num_cached

    @property
    def held(self) -> KVBuffer:
        """The buffer, once it is laid out."""
        assert self.buffer is not None
        return self.buffer

    @property
    def is_done(self) -> bool:
        """Whether all candidates are."""
        return all(draft.finish is not None for draft in self.drafts.values())


class TorchDrafting:
    """A `Drafting` on torch."""

    def __init__(
        self,
        name: str,
        forward: Forward,
        tokenizer: Tokenizer,
        pieces: PieceTable,
        context_limit: int,
        num_candidates: int,
        sampling: Sampling,
        keep_distributions: bool,
    ) -> None:
        self._name, self._forward, self._tokenizer = name, forward, tokenizer
        self._context_limit = context_limit
        self._num_candidates, self._sampling = num_candidates, sampling
        self._keeps_distributions = keep_distributions
        self._rows: list[_Row] = []
        self._joining: list[_Row] = []
        self._branches = Branches()
        self._layout: Layout | None = None
        self._num_rows = 0  # of the layout, those that are done among them
        self._trail = Trail()
        self._open = OpenDrafts(pieces, num_candidates)

    def add(self, sequence: TorchSequence, boundary: Boundary, uniforms: FloatArray) -> None:
        """A sequence joins."""
        check_room(sequence, boundary.max_tokens, self._context_limit)
        check_sequences([sequence, *(row.sequence for row in self._rows + self._joining)])
        sequence.readable()
        drafts = self._open.add(boundary, uniforms)
        sequence.version += 1  # the columns behind the sequence are about to be written
        self._joining.append(_Row(sequence, sequence.version, drafts, self._trail.num_passes))

    @torch.inference_mode()
    def run(self, num_wanted: int) -> list[tuple[TorchSequence, list[Candidate]]]:
        """Draw on until so many more sequences, or all, have their candidates."""
        done: list[_Row] = []
        while (self._rows or self._joining) and len(done) < num_wanted:
            # Rows that are done cost as much as others.
            if self._joining or 2 * len(self._rows) <= self._num_rows:
                self._arrange()
            self._draw()
            done += [row for row in self._rows if row.is_done]
            self._rows = [row for row in self._rows if not row.is_done]
        found = self._finished(done)
        if not self._rows:  # whoever waits for others to join holds no memory
            self._layout, self._num_rows, self._branches = None, 0, Branches()
        return found

    def _arrange(self) -> None:
        """Lay the rows out anew, with those that join."""
        joining, self._joining = self._joining, []
        rows = [*self._rows, *joining]
        if not self._rows and len(joining) == 1:
            [row] = joining
            self._layout = self._forward.rows([Part(row.sequence.writable(), 0, row.num_held)])
        else:
            self._layout = self._stacked(joining)
        for place, row in enumerate(rows):
            row.buffer, row.place = self._layout.buffer, place
        for row in joining:
            pending = row.sequence.token_ids[-1]
            self._branches.add(row.place, pending, row.num_held, list(row.drafts))
        self._rows, self._num_rows = rows, len(rows)

    def _stacked(self, joining: Sequence[_Row]) -> Layout:
        """The rows under way, without the columns that nobody needs, and the joining ones."""
        parts, positions = [], []
        moves: dict[int, tuple[int, Sequence[int]]] = {}
        for place, row in enumerate(self._rows):
            assert self._layout is not None
            ends = (draft.columns for draft in row.drafts.values())
            columns = sorted({*self._branches.held(row.place), *chain.from_iterable(ends)})
            moves[row.place] = place, columns
            for draft in row.drafts.values():
                draft.columns = moved(draft.columns, columns)
            chosen = self._forward.tensor(columns)
            parts.append(Part(self._layout.buffer, row.place, chosen))
            positions.append(self._layout.positions[row.place, chosen])
        if moves:
            self._branches.move(moves)
        parts += [Part(row.sequence.readable(), 0, row.num_held) for row in joining]
        return self._forward.rows(parts, positions)

    def _draw(self) -> None:
        """One pass over all branches, and a token for each unfinished candidate."""
        assert self._layout is not None
        branches, num_rows = self._branches, self._num_rows
        output = self._forward.run(
            self._layout, *branches.queries(num_rows), branches.visible(num_rows)
        )
        hidden, logits = output.hidden.flatten(0, 1), output.logits.flatten(0, 1)
        places = branches.places()
        if len(places) != len(logits):
            found = self._forward.tensor(places)
            hidden, logits = hidden[found], logits[found]
        alive, owners = branches.alive, branches.owners
        # Where each branch has one candidate they are the same rows.
        rows = self._forward.tensor(owners) if len(owners) != len(places) else None
        probs = warp(logits, self._sampling) if self._keeps_distributions else None
        ids = sample(logits, self._sampling, self._open.uniforms(alive), rows, probs)
        self._trail.add(alive, owners, ids, logits, hidden, probs)
        branches.take(self._open.drafts, ids.tolist())

    def _finished(self, rows: Sequence[_Row]) -> list[tuple[TorchSequence, list[Candidate]]]:
        """The candidates of rows that are done."""
        if not rows:
            return []
        drafts = {number: draft for row in rows for number, draft in row.drafts.items()}
        drawn = self._trail.take(list(drafts), min(row.first_pass for row in rows))
        handles = [
            Handle(
                sequence=row.sequence,
                version=row.version,
                buffer=row.held,
                row=row.place,
                columns=draft.columns,
                distributions=self._trail.distributions(number),
            )
            for row in rows
            for number, draft in row.drafts.items()
        ]
        candidates = iter(
            finish_candidates(self._name, self._tokenizer, list(drafts.values()), *drawn, handles)
        )
        self._open.drop(drafts)
        known = self._trail.num_passes
        self._trail.forget(min((row.first_pass for row in self._rows), default=known))
        return [(row.sequence, list(islice(candidates, self._num_candidates))) for row in rows]

"""Drawing candidates token by token, for jobs that come and go.

Each job is a row of the pass and its candidates are leaves of a tree. Who comes joins the next
pass, who is done leaves.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import inf

import numpy as np

from specguard.backends.local.drawlog import DrawLog
from specguard.backends.local.kept import Branch, KeptSequence
from specguard.backends.local.layer import Array, Outputs, Row, TensorLayer
from specguard.backends.local.tree import CandidateTree
from specguard.core.engine import (
    Candidate,
    CandidateFinish,
    FloatArray,
    GenerateJob,
    Sampling,
    least_logprob,
)
from specguard.core.errors import SpecguardError
from specguard.core.text import PieceTable, StepScanner

PREFILL_CHUNK = 2048  # tokens of a prefix that are forwarded at a time


@dataclass(slots=True, eq=False)
class _Draft:
    """A candidate in the making: its tokens, the columns of its KV, what follows it.

    It ends with the token by which ``total``, its log-probability, falls below ``least``.
    """

    scanner: StepScanner
    uniforms: FloatArray
    least: float
    total: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    finish: CandidateFinish | None = None
    columns: list[int] = field(default_factory=list)
    ahead: Outputs | None = None
    distributions: list[tuple[Array, int]] = field(default_factory=list)  # and the row of each

    @property
    def uniform(self) -> float:
        """Of the next token."""
        return float(self.uniforms[len(self.token_ids)])

    @property
    def is_at_its_last(self) -> bool:
        """Whether the next token ends it, whatever it is."""
        return len(self.token_ids) + 1 == len(self.uniforms)


@dataclass(slots=True, eq=False)
class DrawnJob:
    """A job under way. ``alive`` are its unfinished candidates: (leaf, number).

    A leaf's output says what follows it; in the beginning, leaf 0 is the prefix.
    """

    job: GenerateJob
    kept: KeptSequence
    drafts: dict[int, _Draft]
    tree: CandidateTree | None = None
    alive: list[tuple[int, int]] = field(default_factory=list)
    num_drawn: int = 0

    @property
    def token_ids(self) -> list[list[int]]:
        """What each candidate has come to be, as far as it was read."""
        return [draft.token_ids for draft in self.drafts.values()]

    def row(self) -> Row:
        """The leaves as a row of the next pass."""
        tree = self.tree
        assert tree is not None
        return Row(self.kept.buffer, tree.num_columns, len(tree.leaves), tree.base, tree.visible())


class Drawing:
    """Jobs of one engine that are drawn alike: by one sampling, with the same things kept."""

    def __init__(
        self, layer: TensorLayer, pieces: PieceTable, sampling: Sampling, wants: tuple[bool, bool]
    ) -> None:
        self._layer, self._pieces, self._sampling = layer, pieces, sampling
        self._keeps_hidden, self._keeps_distributions = wants
        self._numbers = count()
        self._jobs: list[DrawnJob] = []
        self._joining: list[DrawnJob] = []
        self._drafts: dict[int, _Draft] = {}
        self._outputs: Outputs | None = None  # of the leaves of all jobs, in late reading
        self._firsts: list[int] = []  # row of each job's first leaf in the outputs
        self._log = DrawLog(layer, self._keeps_hidden)

    def add(self, job: GenerateJob, kept: KeptSequence) -> DrawnJob:
        """A job joins; until it is done or dropped, nothing else may use what is kept."""
        assert job.uniforms is not None
        least = least_logprob(job)
        drafts = {
            next(self._numbers): _Draft(StepScanner(self._pieces, job.boundary), row, least)
            for row in job.uniforms
        }
        self._drafts |= drafts
        drawn = DrawnJob(job, kept, drafts)
        self._joining.append(drawn)
        return drawn

    def drop(self, job: DrawnJob) -> None:
        """A job is cancelled: it leaves at once."""
        if job in self._joining:
            self._joining.remove(job)
        else:
            job.alive = []
            self._leave([job])
        self._forget(job)

    def advance(self) -> list[DrawnJob]:
        """A token for each unfinished candidate; the jobs that are done with it."""
        outputs, firsts = self._following()
        alive = [
            (first + leaf, number)
            for job, first in zip(self._jobs, firsts, strict=True)
            for leaf, number in job.alive
        ]
        owners, numbers = [row for row, _ in alive], [number for _, number in alive]
        drafts = [self._drafts[number] for number in numbers]
        uniforms = np.array([draft.uniform for draft in drafts], dtype=np.float32)
        token_ids = self._layer.sample(outputs.logits, owners, self._sampling, uniforms)
        self._log.add(numbers, owners, outputs, token_ids)
        is_watched = any(draft.least > -inf for draft in drafts)
        if is_watched:
            self._log.describe()  # before the next pass, which would be waited for, too
        if self._keeps_distributions:
            probs = self._layer.warp(outputs.logits, self._sampling)
            for owner, draft in zip(owners, drafts, strict=True):
                draft.distributions.append((probs, owner))
        self._outputs, self._firsts = None, []
        if self._layer.reads_late:
            self._read_late(token_ids, drafts, is_watched)
        else:
            self._read(token_ids, is_watched)
        done = [job for job in self._jobs if not job.alive]
        self._leave(done)
        return done

    def candidates(
        self, job: DrawnJob, name: str, decode: Callable[[Sequence[int]], str]
    ) -> list[Candidate]:
        """The candidates of a job that is done; they stay behind as branches.

        Raises:
            SpecguardError: a log-probability is not finite; ``name`` is the model's.
        """
        assert job.tree is not None
        numbers, drafts = list(job.drafts), list(job.drafts.values())
        self._forget(job)
        drawn = self._log.take(numbers, self._drafts.keys())
        if not np.isfinite(drawn.logprobs).all():
            raise not_finite(name)
        candidates = []
        for place, draft in enumerate(drafts):
            assert draft.finish is not None
            is_own = drawn.owners == place
            sums = drawn.hidden_sums
            candidates.append(
                Candidate(
                    token_ids=tuple(draft.token_ids),
                    text=decode(draft.token_ids),
                    token_logprobs=drawn.logprobs[is_own],
                    finish=draft.finish,
                    token_entropies=drawn.entropies[is_own],
                    embedding=None if sums is None else sums[place] / len(draft.token_ids),
                    distributions=self._distributions(draft),
                )
            )
        job.kept.branches += [
            Branch(tuple(draft.token_ids), draft.columns, draft.ahead) for draft in drafts
        ]
        # The last tokens of all of them may not have been forwarded: nobody has written there.
        ends = [draft.columns[-1] + 1 for draft in drafts if draft.columns]
        job.kept.num_columns = max(ends, default=job.kept.num_columns)
        return candidates

    def _distributions(self, draft: _Draft) -> FloatArray | None:
        """What each token was drawn from; read now, when no pass is waited for."""
        if not draft.distributions:
            return None
        return np.stack([self._layer.numpy(probs)[row] for probs, row in draft.distributions])

    def _following(self) -> tuple[Outputs, list[int]]:
        """What follows each leaf of each job, and the row of each job's first one."""
        joining, self._joining = self._joining, []
        if self._outputs is None:
            self._jobs += joining
            self._firsts = []
            outputs, firsts = self._forward(self._jobs)
        else:
            outputs, firsts = self._outputs, self._firsts
            if joining:
                more, others = self._forward(joining)
                firsts = firsts + [len(outputs.logits) + first for first in others]
                outputs = self._layer.joined([outputs, more])
                self._jobs += joining
        return outputs, firsts

    def _forward(
        self, jobs: Sequence[DrawnJob], drawn: Array | None = None
    ) -> tuple[Outputs, list[int]]:
        """Forward the newest tokens of jobs, ``drawn`` or known, and the prefix of new ones."""
        rows: list[Row] = []
        token_ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        known: list[Outputs] = []  # of prefixes of which nothing is to be forwarded
        places: list[tuple[bool, int]] = []
        for job in jobs:
            if job.tree is not None:
                row = job.row()
                places.append((False, len(wanted)))
                wanted += range(len(positions), len(positions) + row.num_queries)
                token_ids += [leaf.token_id for leaf in job.tree.leaves]
                positions += [len(job.job.prefix) + job.num_drawn - 1] * row.num_queries
                rows.append(row)
                continue
            unread = prepare(self._layer, job.kept, job.job.prefix, job.job.first_candidate > 0)
            if not unread:
                assert job.kept.ahead is not None
                places.append((True, len(known)))
                known.append(job.kept.ahead)
                continue
            start = len(job.job.prefix) - len(unread)
            places.append((False, len(wanted)))
            wanted.append(len(positions) + len(unread) - 1)
            token_ids += unread
            positions += range(start, start + len(unread))
            rows.append(Row(job.kept.buffer, start, len(unread), start))
        parts: list[Outputs] = []
        if rows:
            outputs = self._layer.forward(
                rows, token_ids if drawn is None else drawn, positions, wanted
            )
            assert outputs is not None
            parts.append(outputs)
        outputs = self._layer.joined([*parts, *known])
        firsts = [len(wanted) + place if is_known else place for is_known, place in places]
        for job, first in zip(jobs, firsts, strict=True):
            if job.tree is None:
                self._plant(job, outputs, first)
        return outputs, firsts

    def _plant(self, job: DrawnJob, outputs: Outputs, first: int) -> None:
        """The prefix has been forwarded: candidates may be drawn from what follows it."""
        kept, prefix = job.kept, job.job.prefix
        if kept.token_ids != prefix:
            kept.hold(prefix)
        if kept.ahead is None and len(job.drafts) > 1:  # further candidates may be asked for
            kept.ahead = self._layer.take(outputs, [first])
        job.tree = CandidateTree(len(prefix), kept.num_columns, not self._layer.reads_late)
        job.alive = [(0, number) for number in job.drafts]

    def _drawn(self, token_ids: Array, is_watched: bool) -> Iterator[tuple[int, float]]:
        """Tokens and their log-probabilities, which are looked at where a candidate ends by them.

        Else they are described later, those of many passes in one go.
        """
        read = self._layer.read(token_ids)
        logprobs = self._log.newest().tolist() if is_watched else [0.0] * len(read)
        return zip(read, logprobs, strict=True)

    def _read(self, token_ids: Array, is_watched: bool) -> None:
        """Read what was drawn; who goes on is a leaf of the next pass."""
        drawn = self._drawn(token_ids, is_watched)
        for job in self._jobs:
            assert job.tree is not None
            going_on = []
            for leaf, number in job.alive:
                (token_id, logprob), draft = next(drawn), self._drafts[number]
                if _take(draft, token_id, logprob):
                    going_on.append((leaf, token_id, number))
                else:
                    draft.columns = job.tree.columns_of(leaf)
            job.num_drawn += 1
            job.tree.grow(going_on)
            job.alive = [
                (place, number)
                for place, leaf in enumerate(job.tree.leaves)
                for number in leaf.members
            ]

    def _read_late(self, token_ids: Array, drafts: Sequence[_Draft], is_watched: bool) -> None:
        """Begin the pass over what was drawn, for every candidate, and read only then."""
        for job in self._jobs:
            assert job.tree is not None
            job.tree.grow([(leaf, 0, number) for leaf, number in job.alive])
            job.alive = [(place, number) for place, (_, number) in enumerate(job.alive)]
            job.num_drawn += 1
        if not all(draft.is_at_its_last for draft in drafts):
            self._outputs, self._firsts = self._forward(self._jobs, token_ids)
        drawn = self._drawn(token_ids, is_watched)
        firsts = self._firsts or [0] * len(self._jobs)
        for job, first in zip(self._jobs, firsts, strict=True):
            assert job.tree is not None
            going_on = []
            for leaf, number in job.alive:
                draft = self._drafts[number]
                if _take(draft, *next(drawn)):
                    going_on.append((leaf, number))
                    continue
                draft.columns = job.tree.columns_of(leaf)
                if self._outputs is None:
                    del draft.columns[-1]
                else:
                    draft.ahead = self._layer.take(self._outputs, [first + leaf])
            job.alive = going_on

    def _leave(self, jobs: Sequence[DrawnJob]) -> None:
        if self._outputs is not None:
            pairs = zip(self._jobs, self._firsts, strict=True)
            self._firsts = [first for job, first in pairs if job not in jobs]
        self._jobs = [job for job in self._jobs if job not in jobs]
        if not self._jobs:  # whoever waits for others to join holds no memory
            self._outputs = None

    def _forget(self, job: DrawnJob) -> None:
        for number in job.drafts:
            self._drafts.pop(number, None)


def prepare(
    layer: TensorLayer, kept: KeptSequence, prefix: tuple[int, ...], keeps_branches: bool = False
) -> list[int]:
    """Adopt what is kept of a prefix, forward all but a last chunk; the tokens still unread.

    None are where the output of the last token is kept, too.
    """
    kept.adopt(prefix, keeps_branches)
    if kept.token_ids == prefix and kept.ahead is None:
        kept.drop_last()
    while len(prefix) - len(kept.token_ids) > PREFILL_CHUNK:
        start = len(kept.token_ids)
        chunk = prefix[start : start + PREFILL_CHUNK]
        row = Row(kept.buffer, start, len(chunk), start)
        layer.forward([row], chunk, range(start, start + len(chunk)), None)
        kept.hold(prefix[: start + len(chunk)])
    return list(prefix[len(kept.token_ids) :])


def not_finite(name: str) -> SpecguardError:
    """What a model has computed are no probabilities."""
    return SpecguardError(
        f"{name} gives probabilities that are not finite",
        "try --dtype float32; the weights may be damaged",
    )


def _take(draft: _Draft, token_id: int, logprob: float) -> bool:
    """Append a token; whether the candidate goes on."""
    draft.token_ids.append(token_id)
    draft.total += logprob
    draft.finish = draft.scanner.feed(token_id)
    if draft.finish is None and draft.total < draft.least:
        draft.finish = "length"
    return draft.finish is None

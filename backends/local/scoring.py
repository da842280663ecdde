"""Scoring jobs of one engine in one pass: each is a row, its continuations a tree behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from specguard.backends.local.drawing import prepare
from specguard.backends.local.kept import Branch, KeptSequence
from specguard.backends.local.layer import Outputs, Row, RowCapture, TensorLayer
from specguard.backends.local.tree import ContinuationTree
from specguard.core.engine import Observation, ScoreJob

_DESCRIBED = 128  # tokens whose rows of log-probabilities exist at a time


@dataclass(frozen=True, slots=True, eq=False)
class _Laid:
    """A job laid out: its row, its tree, and its first query among those of the pass."""

    job: ScoreJob
    kept: KeptSequence
    tree: ContinuationTree
    row: Row
    first: int


def score_together(
    layer: TensorLayer, jobs: Sequence[tuple[ScoreJob, KeptSequence]]
) -> list[list[Observation]]:
    """What each job asks for; the continuations stay behind as branches."""
    laid: list[_Laid] = []
    first = 0
    for job, kept in jobs:
        laid.append(_lay(layer, job, kept, first))
        first += laid[-1].row.num_queries
    # Queries that predict a token, each once, in order.
    wanted = sorted(
        {each.first + place for each in laid for path in each.tree.places for place in path}
    )
    outputs = layer.forward(
        [each.row for each in laid],
        [token_id for each in laid for token_id in each.tree.token_ids],
        [position for each in laid for position in each.tree.positions],
        wanted,
    )
    assert outputs is not None
    rows = {query: row for row, query in enumerate(wanted)}
    paths = [
        [rows[each.first + place] for place in path] for each in laid for path in each.tree.places
    ]
    continuations = [token_ids for each in laid for token_ids in each.job.continuations]
    observations = iter(_observe(layer, outputs, laid, paths, continuations))
    results = []
    for each in laid:
        results.append([next(observations) for _ in each.job.continuations])
        _keep(each)
    return results


def _lay(layer: TensorLayer, job: ScoreJob, kept: KeptSequence, first: int) -> _Laid:
    unread = prepare(layer, kept, job.prefix)
    if not unread:  # the last token predicts the first of each continuation
        kept.drop_last()
        unread = [job.prefix[-1]]
    start = len(job.prefix) - len(unread)
    needs_last = job.distributions is not None or job.choices
    tree = ContinuationTree.behind(unread, start, job.continuations, needs_last)
    row = Row(kept.buffer, start, len(tree.token_ids), start, tree.visible)
    if job.capture is not None:
        context = range(len(job.prefix) - 1)
        for path, token_ids in zip(tree.places, job.continuations, strict=True):
            queries = path[: len(token_ids)]
            columns = [*context, *(start + place for place in queries)]
            row.captures.append(RowCapture(job.capture, queries, columns))
    return _Laid(job, kept, tree, row, first)


def _keep(each: _Laid) -> None:
    """The prefix has been forwarded, and the continuations but for their last tokens."""
    each.kept.hold(each.job.prefix)
    each.kept.num_columns = each.row.stop
    each.kept.branches = [
        Branch(token_ids, [each.row.start + place for place in path[1:]])
        for path, token_ids in zip(each.tree.places, each.job.continuations, strict=True)
    ]


def _observe(
    layer: TensorLayer,
    outputs: Outputs,
    laid: Sequence[_Laid],
    paths: Sequence[Sequence[int]],
    continuations: Sequence[tuple[int, ...]],
) -> list[Observation]:
    owners = [
        row
        for path, token_ids in zip(paths, continuations, strict=True)
        for row in path[: len(token_ids)]
    ]
    token_ids = [token_id for continuation in continuations for token_id in continuation]
    logprobs, entropies = np.empty((2, len(owners)), dtype=np.float32)
    order = np.argsort(owners, kind="stable")  # rows that are described together lie together
    for start in range(0, len(order), _DESCRIBED):
        piece = order[start : start + _DESCRIBED]
        rows = [owners[place] for place in piece]
        described = layer.describe(
            [
                (
                    outputs.logits[rows[0] : rows[-1] + 1],
                    [row - rows[0] for row in rows],
                    [token_ids[place] for place in piece],
                )
            ]
        )
        logprobs[piece], entropies[piece] = map(layer.numpy, described)
    choices = layer.first_choices(outputs.logits)
    is_choice = choices[owners] == np.array(token_ids)
    ends = list(accumulate(map(len, continuations)))
    captures = iter([capture for each in laid for capture in each.row.captures])
    observations = []
    jobs = [each.job for each in laid for _ in each.job.continuations]
    for job, path, continuation, end in zip(jobs, paths, continuations, ends, strict=True):
        own = slice(end - len(continuation), end)
        state = probs = None
        if job.hidden_state:
            state = layer.numpy(layer.take(outputs, [path[len(continuation) - 1]]).hidden)[0]
        if job.distributions is not None:
            logits = layer.take(outputs, path).logits
            probs = layer.numpy(layer.warp(logits, job.distributions))
        observations.append(
            Observation(
                token_logprobs=logprobs[own],
                is_first_choice=is_choice[own],
                token_entropies=entropies[own],
                blocks=tuple(next(captures).blocks) if job.capture is not None else None,
                hidden_state=state,
                distributions=probs,
                choices=tuple(choices[path].tolist()) if job.choices else None,
            )
        )
    return observations

"""What an engine answers, found wrong where it comes in: the error of that problem alone.

Engines may be anybody's. Knows jobs and answers, and nothing of what they are used for.
"""

from collections.abc import Sequence, Sized

import numpy as np

from specguard.core.engine import Candidate, FloatArray, GenerateJob, Observation, ScoreJob
from specguard.core.errors import SpecguardError

_ROUNDING = 1e-2  # by which a log-probability may come out above 0


def check_candidates(engine: str, job: GenerateJob, candidates: Sequence[Candidate]) -> None:
    """Refuse candidates that cannot be the answer to a job.

    Raises:
        SpecguardError: too many or too few, none of the tokens asked for, figures of other tokens,
            or figures that are no log-probabilities.
    """
    _check_count(engine, len(candidates), job.num_candidates, "candidates")
    for candidate in candidates:
        n, most = len(candidate.token_ids), job.boundary.max_tokens
        is_part = bool(job.boundary.begun)
        if n > most or (n == 0 and (is_part or candidate.finish != "eos")):
            raise _wrong(engine, f"drew {n} tokens where 1 to {most} were asked for")
        _check_logprobs(engine, candidate.token_logprobs, n)
        _check_length(engine, "entropies", candidate.token_entropies, n)
        if job.distributions:
            _check_length(engine, "distributions", candidate.distributions, n)


def check_observations(engine: str, job: ScoreJob, observations: Sequence[Observation]) -> None:
    """Refuse observations that cannot be the answer to a job.

    Raises:
        SpecguardError: as `check_candidates`, and where what was asked for is not there.
    """
    _check_count(engine, len(observations), len(job.continuations), "observations")
    for token_ids, seen in zip(job.continuations, observations, strict=True):
        n = len(token_ids)
        _check_logprobs(engine, seen.token_logprobs, n)
        _check_length(engine, "first choices", seen.is_first_choice, n)
        _check_length(engine, "entropies", seen.token_entropies, n)
        if job.choices:
            _check_length(engine, "choices", seen.choices, n + 1)
        if job.distributions is not None:
            _check_length(engine, "distributions", seen.distributions, n + 1)
        if job.capture is not None:
            blocks = seen.blocks or ()
            _check_count(engine, len(blocks), job.capture.num_layers, "attention blocks")
            for block in blocks:
                _check_length(engine, "attention rows", block.step, n)
                if np.isnan(block.source_mass).any() or np.isnan(block.step).any():
                    raise _wrong(engine, "read attention that is not a number")


def _check_count(engine: str, count: int, wanted: int, what: str) -> None:
    if count != wanted:
        raise _wrong(engine, f"gave {count} {what} where {wanted} were asked for")


def _check_length(engine: str, what: str, values: Sized | None, wanted: int) -> None:
    if values is not None and len(values) != wanted:
        raise _wrong(engine, f"gave {len(values)} {what} where there are {wanted}")


def _check_logprobs(engine: str, logprobs: FloatArray, num_tokens: int) -> None:
    _check_length(engine, "log-probabilities", logprobs, num_tokens)
    if not (logprobs <= _ROUNDING).all():  # NaN neither
        raise _wrong(engine, "gave a log-probability that is none")


def _wrong(engine: str, what: str) -> SpecguardError:
    return SpecguardError(
        f"the engine {engine} {what}",
        "that is a defect of the engine, or of the model's weights; try another --backend",
    )

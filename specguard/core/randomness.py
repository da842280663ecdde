"""Uniforms keyed by what they are for, so that a result depends on no batch slot and no engine."""

from enum import IntEnum
from hashlib import blake2b

import numpy as np

from specguard.core.engine import FloatArray


class Purpose(IntEnum):
    """What a stream of uniforms is drawn for; no two purposes share one."""

    DRAFT = 0
    REWRITE = 1  # by the target, of a whole step
    ACCEPT = 2  # of guessed tokens
    GUESS = 3  # of single tokens, by the draft
    CORRECT = 4  # by the target, the token after those that were accepted


def problem_key(problem: str) -> int:
    """A 64-bit key of the problem's text: its solution depends on no order of problems."""
    return int.from_bytes(blake2b(problem.encode(), digest_size=8).digest(), "little")


def uniforms(
    seed: int, problem: int, purpose: Purpose, step: int, num_candidates: int, count: int
) -> FloatArray:
    """Float32 uniforms [num_candidates, count] in [0, 1) from NumPy's Philox.

    A candidate's uniform at a position depends on neither ``num_candidates`` nor ``count``.
    """
    # As unsigned integers: a list would pass through float64 and lose bits.
    key = np.array([seed, problem], dtype=np.uint64)
    bits = np.random.Philox(key=key, counter=[0, purpose, 0, step])
    generator = np.random.Generator(bits)
    # To set the counter is a fraction of the work of making a generator for each candidate.
    start = bits.state
    rows = np.empty((num_candidates, count), dtype=np.float32)
    for candidate, row in enumerate(rows):
        start["state"]["counter"][2] = candidate
        bits.state = start
        generator.random(dtype=np.float32, out=row)
    return rows


def job_seed(seed: int, problem: int, purpose: Purpose, step: int, first_candidate: int) -> int:
    """A 63-bit seed for an engine that draws by a randomness of its own."""
    parts = f"{seed} {problem} {int(purpose)} {step} {first_candidate}"
    digest = blake2b(parts.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

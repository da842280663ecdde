"""Uniforms keyed by what they are for, so that a result depends on no batch slot and no backend."""

from collections.abc import Sequence
from enum import IntEnum
from hashlib import blake2b

import numpy as np

from specguard.core.model import FloatArray


class Purpose(IntEnum):
    """What a stream of uniforms is drawn for."""

    DRAFT = 0
    TARGET = 1
    ACCEPT = 2


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
    found = np.empty((num_candidates, count), dtype=np.float32)
    for candidate, row in enumerate(found):
        start["state"]["counter"][2] = candidate
        bits.state = start
        generator.random(dtype=np.float32, out=row)
    return found


def side_by_side(uniforms: Sequence[FloatArray]) -> FloatArray:
    """Uniforms [..., n] in one array, the shorter ones filled up with zeros."""
    width = max(part.shape[-1] for part in uniforms)
    grid = np.zeros((len(uniforms), *uniforms[0].shape[:-1], width), dtype=uniforms[0].dtype)
    for row, part in zip(grid, uniforms, strict=True):
        row[..., : part.shape[-1]] = part
    return grid

"""Jobs that the contract's tests hand to an engine, and what they compare."""

import asyncio
import shutil
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specguard.core import (
    Boundary,
    Candidate,
    Capture,
    Engine,
    GenerateJob,
    Observation,
    Sampling,
    ScoreJob,
)
from specguard.core.engine import FloatArray
from specguard.core.randomness import Purpose, uniforms
from tests.reference import ReferenceEngine

SAMPLING = Sampling(0.9, 0.95)
FLAT = Sampling(2.0, 1.0)  # no token is so unlikely that rounding could hide it
PREFIX = (5, 40, 41, 60, 61, 62, 7)
OTHER_PREFIX = (5, 90, 33, 34)
TOLERANCE = 1e-4


def boundary(
    engine: Engine, cap: int, delimiter: str = "\n\n", begun: tuple[int, ...] = ()
) -> Boundary:
    return Boundary(delimiter, engine.tokenizer.eos_ids, cap, begun)


def draws(num_candidates: int, cap: int, seed: int = 0) -> FloatArray:
    return uniforms(seed, 0, Purpose.DRAFT, 0, num_candidates, cap)


def generate_job(
    engine: Engine,
    prefix: tuple[int, ...] = PREFIX,
    num_candidates: int = 2,
    cap: int = 6,
    sampling: Sampling = SAMPLING,
    *,
    key: Hashable = "problem",
    seed: int = 0,
    first: int = 0,
    **more: Any,
) -> GenerateJob:
    """A job whose candidates are the ones from ``first`` on of all that the seed gives."""
    more.setdefault("boundary", boundary(engine, cap))
    more.setdefault("uniforms", draws(first + num_candidates, cap, seed)[first:])
    return GenerateJob(
        key=key,
        prefix=prefix,
        sampling=sampling,
        num_candidates=num_candidates,
        first_candidate=first,
        **more,
    )


def score_job(
    continuations: Sequence[Sequence[int]],
    prefix: tuple[int, ...] = PREFIX,
    *,
    key: Hashable = "problem",
    **more: Any,
) -> ScoreJob:
    return ScoreJob(key=key, prefix=prefix, continuations=tuple(map(tuple, continuations)), **more)


def run(engine: Engine, job: GenerateJob | ScoreJob) -> list[Any]:
    """The result of a job."""
    [result] = run_together(engine, [job])
    return result


def run_together(engine: Engine, jobs: Sequence[GenerateJob | ScoreJob]) -> list[list[Any]]:
    """The results of jobs that are there at the same time."""

    async def work() -> list[list[Any]]:
        return await asyncio.gather(
            *(
                engine.generate(job) if isinstance(job, GenerateJob) else engine.score(job)
                for job in jobs
            )
        )

    return asyncio.run(work())


def outcomes(engine: Engine, jobs: Sequence[GenerateJob | ScoreJob]) -> list[Any]:
    """The results or errors of jobs that are there at the same time."""

    async def work() -> list[Any]:
        verbs = [
            engine.generate(job) if isinstance(job, GenerateJob) else engine.score(job)
            for job in jobs
        ]
        waiting = asyncio.gather(*verbs, return_exceptions=True)
        return await asyncio.wait_for(waiting, 30)  # seconds; nobody waits for ever

    return asyncio.run(work())


def capture(
    prefix: Sequence[int], sources: str = "context", num_layers: int = 3, epsilon: float = 0.01
) -> Capture:
    """A capture of all the context, or of every third token of it."""
    places = np.arange(len(prefix))
    is_source = places >= 0 if sources == "context" else places % 3 == 1
    return Capture(is_source, num_layers, epsilon)


def forcing(
    plain: ReferenceEngine, prefix: tuple[int, ...], step: Sequence[int], cap: int
) -> FloatArray:
    """Uniforms [cap] by which `FLAT` draws these tokens behind the prefix."""
    row = np.full(cap, 0.5)
    for place, token_id in enumerate(step[:cap]):
        cdf = np.cumsum(plain.distribution([*prefix, *step[:place]], FLAT))
        row[place] = (cdf[token_id] + (cdf[token_id - 1] if token_id else 0.0)) / 2
    return row.astype(np.float32)


def assert_same(found: Any, expected: Any) -> None:
    """Two lists of candidates or of observations say the same."""
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, Candidate):
            _assert_same_candidate(one, other)
        else:
            _assert_same_observation(one, other)


def _assert_same_candidate(found: Candidate, expected: Candidate) -> None:
    assert found.token_ids == expected.token_ids
    assert (found.text, found.finish) == (expected.text, expected.finish)
    _assert_close(found, expected, "token_logprobs", "token_entropies", "distributions")
    _assert_close(found, expected, "embedding", tolerance=1e-3)


def _assert_same_observation(found: Observation, expected: Observation) -> None:
    assert found.is_first_choice.tolist() == expected.is_first_choice.tolist()
    assert found.choices == expected.choices
    _assert_close(found, expected, "token_logprobs", "token_entropies", "distributions")
    _assert_close(found, expected, "hidden_state", tolerance=1e-3)
    assert (found.blocks is None) == (expected.blocks is None)
    for block, wanted in zip(found.blocks or (), expected.blocks or (), strict=True):
        _assert_close(block, wanted, "source_mass", "sink_mass", "step", tolerance=1e-5)


def _assert_close(
    found: object, expected: object, *names: str, tolerance: float = TOLERANCE
) -> None:
    for name in names:
        array, wanted = getattr(found, name), getattr(expected, name)
        assert (array is None) == (wanted is None), name
        if array is not None:
            assert array.shape == wanted.shape, name
            np.testing.assert_allclose(array, wanted, atol=tolerance, rtol=0, err_msg=name)


def damaged_copy(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint whose embedding of token 300 is not a number."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][300] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

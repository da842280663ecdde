"""Draft steps sampled after right prefixes, judged by the checker, with every signal on them."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from recipes.tiny.checker import judge
from specguard import Engine
from specguard.backends.checkpoint import open_checkpoint
from specguard.bench.journal import Journal
from specguard.core import (
    Boundary,
    Candidate,
    Capture,
    LanguageModel,
    Observation,
    PieceTable,
    Sampling,
)
from specguard.core.config import Sources
from specguard.core.embedders import load_embedder
from specguard.core.grounding import grounding, source_mask
from specguard.core.model import FloatArray
from specguard.core.randomness import Purpose, problem_key, uniforms
from specguard.core.selector import Embedder, distinct, mean_similarities
from specguard.models.tiny import problems

NUM_SAMPLES = (4, 8, 16)  # every k that is looked at; the samples of a smaller one come first
MAX_STEP_TOKENS = 128
SOURCES: tuple[Sources, ...] = ("problem", "context")
EPSILONS = (0.0, 0.01)
RESIDUAL = 0.5


def collect(
    engine: Engine, embedders: Sequence[str], stream: int, count: int, path: Path
) -> list[dict[str, Any]]:
    """The steps of ``count`` problems, from a journal at ``path`` that holds a row a problem.

    ``samples`` are the drawn candidates as indices into ``candidates``, the distinct ones, each
    with its judgement and its signals by name. ``similarities`` by embedder and k are those of the
    first k samples.
    """
    loaded = {name: load_embedder(name) for name in embedders}
    assert engine.draft is not None
    assert engine.target is not None
    settings = {
        "draft": engine.draft.name,
        "target": engine.target.name,
        "stream": stream,
        "embedders": list(embedders),
    }
    with Journal(path, settings) as journal:
        done = {row["problem"] for row in journal.rows}
        for index in range(count):
            if index not in done:
                rows = _problem_rows(engine, loaded, problems.generate(stream, index))
                journal.append({"problem": index, "steps": rows})
        return steps_of(journal.rows[:count])


def steps_of(problem_rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps in a journal's rows, each with the number of its problem."""
    return [{"problem": row["problem"], **step} for row in problem_rows for step in row["steps"]]


def _problem_rows(
    engine: Engine, embedders: dict[str, Embedder], problem: problems.Problem
) -> list[dict[str, Any]]:
    draft, target = engine.draft, engine.target
    assert draft is not None
    assert target is not None
    prompt = draft.tokenizer.encode_prompt(problem.text, None, False)
    pieces = PieceTable(draft.tokenizer)
    rows = []
    with closing(draft.start(prompt)) as ours, closing(target.start(prompt)) as theirs:
        for index, right in enumerate(problem.steps):
            boundary = Boundary(problems.DELIMITER, draft.tokenizer.eos_ids, MAX_STEP_TOKENS)
            draws = uniforms(
                engine.config.seed,
                problem_key(problem.text),
                Purpose.DRAFT,
                index,
                max(NUM_SAMPLES),
                MAX_STEP_TOKENS,
            )
            [samples] = draft.propose(
                [ours],
                max(NUM_SAMPLES),
                engine.config.sampling or Sampling(),
                [boundary],
                draws[np.newaxis],
            )
            kept = distinct(samples)
            candidates = [samples[place] for place in kept]
            places = {candidate.token_ids: i for i, candidate in enumerate(candidates)}
            signals: list[dict[str, float]] = [{} for _ in candidates]
            for role, model, sequence in ("draft", draft, ours), ("target", target, theirs):
                found = _signals(model, sequence, prompt, candidates, pieces)
                for own, new in zip(signals, found, strict=True):
                    own.update({f"{role} {name}": value for name, value in new.items()})
            rows.append(
                {
                    "step": index,
                    "is_answer": index == len(problem.steps) - 1,
                    "num_steps": len(problem.steps),
                    "num_actors": len({f for s in problem.sentences for f, _ in s.facts}),
                    "samples": [places[sample.token_ids] for sample in samples],
                    "similarities": _similarities(embedders, samples),
                    "candidates": [
                        {
                            "text": candidate.text,
                            "error": _error(problem, problem.steps[:index], candidate.text),
                            "signals": own,
                        }
                        for candidate, own in zip(candidates, signals, strict=True)
                    ],
                }
            )
            token_ids = draft.tokenizer.encode(right + problems.DELIMITER)
            draft.extend([ours], [token_ids])
            target.extend([theirs], [token_ids])
    return rows


def _error(problem: problems.Problem, before: Sequence[str], text: str) -> str | None:
    kind = judge(problem, before, text.strip()).kind
    return None if kind is None else kind.value


def _similarities(
    embedders: dict[str, Embedder], samples: Sequence[Candidate]
) -> dict[str, dict[str, list[float]]]:
    found = {}
    for name, embed in embedders.items():
        rows = embed(samples)
        found[name] = {str(k): list(mean_similarities(rows[:k])) for k in NUM_SAMPLES}
    return found


def _signals(
    model: LanguageModel[Any],
    sequence: Any,
    prompt: Any,
    candidates: Sequence[Candidate],
    pieces: PieceTable,
) -> list[dict[str, float]]:
    """Every signal of one model on each candidate, by name."""
    continuations = [candidate.token_ids for candidate in candidates]
    is_digit = [
        np.array([any(map(str.isdigit, pieces(token))) for token in token_ids])
        for token_ids in continuations
    ]
    found: list[dict[str, float]] = []
    [seen] = model.score([sequence], [continuations])
    for observation, digits in zip(seen, is_digit, strict=True):
        logprobs, entropies = observation.token_logprobs, observation.token_entropies
        found.append(
            {
                "log_prob": float(logprobs.min()),
                "log_prob_mean": float(logprobs.mean()),
                "entropy_max": float(entropies.max()),
                "entropy_mean": float(entropies.mean()),
                **_over_digits("log_prob", logprobs, digits),
            }
        )
    num_layers = num_layers_of(model)
    for sources in SOURCES:
        is_source = source_mask(prompt, len(sequence.token_ids), sources)
        for epsilon in EPSILONS:
            capture = Capture(is_source, num_layers, epsilon)
            [seen] = model.score([sequence], [continuations], [capture])
            for own, observation, digits in zip(found, seen, is_digit, strict=True):
                own.update(
                    _attention_signals(f"{sources} eps={epsilon}", observation, capture, digits)
                )
    return found


def _attention_signals(
    setting: str, observation: Observation, capture: Capture, digits: FloatArray
) -> dict[str, float]:
    blocks = observation.blocks
    assert blocks is not None
    found = {}
    for num_layers in range(1, len(blocks) + 1):
        name = f"{setting} L={num_layers}"
        values = grounding(blocks[-num_layers:], bool(capture.is_source[-1]), RESIDUAL)
        found[f"grounding {name}"] = float(values.min())
        found[f"grounding_mean {name}"] = float(values.mean())
        found.update(_over_digits(f"grounding {name}", values, digits))
        sinks = [block.sink_mass.mean() for block in blocks[-num_layers:]]
        found[f"sink_mass {name}"] = float(np.mean(sinks))
    return found


def num_layers_of(model: LanguageModel[Any]) -> int:
    """Layers of a model that was loaded from a folder."""
    return int(open_checkpoint(model.name).text_config["num_hidden_layers"])


def _over_digits(name: str, values: FloatArray, digits: FloatArray) -> dict[str, float]:
    """Minimum and mean over a step's digits alone; over all of it where it has none."""
    chosen = values[digits] if digits.any() else values
    return {f"{name} digits": float(chosen.min()), f"{name} digits_mean": float(chosen.mean())}

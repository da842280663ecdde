"""Draft steps sampled after right prefixes, judged by the checker, with every signal on them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from recipes.tiny.checker import judge
from specguard import Sampling, Solver
from specguard.backends.checkpoint import open_checkpoint
from specguard.core import Candidate, Capture, Engine, Observation
from specguard.core.config import Author, Sources
from specguard.core.context import ProblemContext
from specguard.core.embedders import load_embedder
from specguard.core.engine import FloatArray
from specguard.core.grounding import grounding, source_mask
from specguard.core.randomness import problem_key
from specguard.core.runner import Runner
from specguard.core.selector import Embedder, distinct, mean_similarities
from specguard.journal import Journal
from specguard.models.tiny import problems

NUM_SAMPLES = (4, 8, 16)  # every k that is looked at; the samples of a smaller one come first
MAX_STEP_TOKENS = 128
SOURCES: tuple[Sources, ...] = ("problem", "context")
EPSILONS = (0.0, 0.01)
RESIDUAL = 0.5


def collect(
    solver: Solver, embedders: Sequence[str], stream: int, count: int, path: Path
) -> list[dict[str, Any]]:
    """The steps of ``count`` problems, from a journal at ``path`` that holds a row a problem.

    ``samples`` are the drawn candidates as indices into ``candidates``, the distinct ones, each
    with its judgement and its signals by name. ``similarities`` by embedder and k are those of the
    first k samples.
    """
    loaded = {name: load_embedder(name) for name in embedders}
    assert solver.draft is not None
    assert solver.target is not None
    settings = {
        "draft": solver.draft.name,
        "target": solver.target.name,
        "stream": stream,
        "embedders": list(embedders),
    }
    with Journal(path, settings) as journal, Runner() as runner:
        done = {row["problem"] for row in journal.rows}
        for index in range(count):
            if index not in done:
                problem = problems.generate(stream, index)
                rows = runner.run(_problem_rows(solver, loaded, problem))
                journal.append({"problem": index, "steps": rows})
        return steps_of(journal.rows[:count])


def steps_of(problem_rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps in a journal's rows, each with the number of its problem."""
    return [{"problem": row["problem"], **step} for row in problem_rows for step in row["steps"]]


async def _problem_rows(
    solver: Solver, embedders: dict[str, Embedder], problem: problems.Problem
) -> list[dict[str, Any]]:
    assert solver.draft is not None
    assert solver.target is not None
    engines: dict[Author, Engine] = {"draft": solver.draft, "target": solver.target}
    prompt = solver.draft.tokenizer.encode_prompt(problem.text, None, False)
    config = replace(solver.config, delimiter=problems.DELIMITER, max_step_tokens=MAX_STEP_TOKENS)
    context = ProblemContext(engines, prompt, problem_key(problem.text), config)
    sampling = config.sampling or Sampling()
    rows = []
    try:
        for index, right in enumerate(problem.steps):
            context.step = index
            samples = await context.generate("draft", sampling, max(NUM_SAMPLES), embeddings=True)
            candidates = [samples[place] for place in distinct(samples)]
            places = {candidate.token_ids: i for i, candidate in enumerate(candidates)}
            signals: list[dict[str, float]] = [{} for _ in candidates]
            for author in engines:
                seen = await _signals(context, author, candidates)
                for own, new in zip(signals, seen, strict=True):
                    own.update({f"{author} {name}": value for name, value in new.items()})
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
            context.append(context.tokenizer.encode(right + problems.DELIMITER))
    finally:
        context.release()
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


async def _signals(
    context: ProblemContext, author: Author, candidates: Sequence[Candidate]
) -> list[dict[str, float]]:
    """Every signal of one model on each candidate, by name."""
    continuations = [candidate.token_ids for candidate in candidates]
    is_digit = [
        np.array([any(map(str.isdigit, context.pieces(token))) for token in token_ids])
        for token_ids in continuations
    ]
    signals: list[dict[str, float]] = []
    seen = await context.score(author, continuations)
    for observation, digits in zip(seen, is_digit, strict=True):
        logprobs, entropies = observation.token_logprobs, observation.token_entropies
        assert entropies is not None
        signals.append(
            {
                "log_prob": float(logprobs.min()),
                "log_prob_mean": float(logprobs.mean()),
                "entropy_max": float(entropies.max()),
                "entropy_mean": float(entropies.mean()),
                **_over_digits("log_prob", logprobs, digits),
            }
        )
    num_layers = num_layers_of(context.engines[author])
    for sources in SOURCES:
        is_source = source_mask(context.prompt, len(context.token_ids), sources)
        for epsilon in EPSILONS:
            capture = Capture(is_source, num_layers, epsilon)
            seen = await context.score(author, continuations, capture)
            for own, observation, digits in zip(signals, seen, is_digit, strict=True):
                own.update(
                    _attention_signals(f"{sources} eps={epsilon}", observation, capture, digits)
                )
    return signals


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


def num_layers_of(engine: Engine) -> int:
    """Layers of a model that was loaded from a folder."""
    return int(open_checkpoint(engine.name).text_config["num_hidden_layers"])


def _over_digits(name: str, values: FloatArray, digits: FloatArray) -> dict[str, float]:
    """Minimum and mean over a step's digits alone; over all of it where it has none."""
    chosen = values[digits] if digits.any() else values
    return {f"{name} digits": float(chosen.min()), f"{name} digits_mean": float(chosen.mean())}

"""Draft steps with every signal on them, and whether they are right.

Knows no step checker: a step after a right prefix is right where the target, going on from it,
still reaches the known answer (as Math-Shepherd labels steps, Wang et al. 2024).
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

from specguard.bench.datasets import Item
from specguard.bench.grading import Grader
from specguard.core import GREEDY, Engine
from specguard.core.randomness import problem_key
from specguard.core.requests import done
from specguard.core.selector import select_medoid
from specguard.core.text import final_answer
from specguard.core.verifier import verify
from specguard.core.writing import Writer


def label_steps(engine: Engine, item: Item, grader: Grader) -> Iterator[dict[str, Any]]:
    """The draft's selected step after every step of the target's own solution but the last.

    Nothing comes of a problem that the target does not solve: what is right there is not known.
    """
    solution = engine.solve(item.problem, method="target", sampling=GREEDY)
    if not grader.grade(solution.answer, item.answer).is_right:
        return
    prefix: list[int] = []
    assert engine.target is not None
    encode = engine.target.tokenizer.encode
    for index, step in enumerate(solution.steps):
        with closing(_writer(engine, item.problem)) as writer:
            writer.append(tuple(prefix))
            writer.step = index
            text, signals = _judge(engine, writer)
        is_right = text == step.text or _reaches(engine, item, grader, prefix + encode(text))
        yield {"step": index, "text": text, "is_right": is_right, "signals": signals}
        prefix += encode(step.text)


def _writer(engine: Engine, problem: str) -> Writer:
    assert engine.draft is not None
    assert engine.target is not None
    config = replace(engine.config, detail=True)  # attention is read whatever is weighed now
    prompt = engine.target.tokenizer.encode_prompt(problem, config.system_prompt, config.thinking)
    models: Any = {"draft": engine.draft, "target": engine.target}
    return Writer(models, prompt, problem_key(problem), config)


def _judge(engine: Engine, writer: Writer) -> tuple[str, dict[str, float]]:
    config = engine.config
    candidates = done(writer.propose("draft", config.num_candidates, config.step_sampling))
    selection = select_medoid(candidates, engine.embedder(config))
    selected = candidates[selection.index]
    verifier = config.verifier
    capture = writer.capture(verifier)
    observation = done(writer.read(verifier.model, selected.token_ids, capture))
    consistency = selection.similarities[selection.index]
    return selected.text, dict(verify(observation, capture, consistency, verifier).signals)


def _reaches(engine: Engine, item: Item, grader: Grader, start: list[int]) -> bool:
    """Whether the target reaches the known answer from these tokens on."""
    with closing(_writer(engine, item.problem)) as writer:
        writer.append(tuple(start))
        text = writer.tokenizer.decode(start)
        while final_answer(text) is None and writer.room > 0:
            [step] = done(writer.propose("target", 1, GREEDY))
            writer.commit("target", step)
            writer.append(step.token_ids)
            writer.step += 1
            text = writer.tokenizer.decode(writer.token_ids[len(writer.prompt.token_ids) :])
            if step.finish == "eos" or writer.step >= engine.config.max_steps:
                break
    return grader.grade(final_answer(text), item.answer).is_right

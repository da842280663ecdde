"""Draft steps with every signal on them, and whether they are right.

Knows no step checker: a step after a right prefix is right where the target, going on from it,
still reaches the known answer (as Math-Shepherd labels steps, Wang et al. 2024).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from specguard.bench.datasets import Item
from specguard.bench.grading import Grader
from specguard.core import GREEDY, Solver
from specguard.core.context import ProblemContext
from specguard.core.randomness import problem_key
from specguard.core.runner import Runner
from specguard.core.selector import select_medoid
from specguard.core.text import final_answer
from specguard.core.verifier import verify


def label_steps(solver: Solver, item: Item, grader: Grader) -> list[dict[str, Any]]:
    """The draft's selected step after every step of the target's own solution but the last.

    Nothing comes of a problem that the target does not solve: what is right there is not known.
    """
    solution = solver.solve(item.problem, method="target", sampling=GREEDY)
    if not grader.grade(solution.boxed_answer, item.answer).is_right:
        return []
    assert solver.target is not None
    encode = solver.target.tokenizer.encode
    rows = []
    prefix: list[int] = []
    with Runner() as runner:
        for index, step in enumerate(solution.steps):
            text, signals = runner.run(_judged_step(solver, item.problem, prefix, index))
            is_right = text == step.text
            if not is_right:
                start = prefix + encode(text)
                answer = runner.run(_answer_from(solver, item.problem, start))
                is_right = grader.grade(answer, item.answer).is_right
            rows.append({"step": index, "text": text, "is_right": is_right, "signals": signals})
            prefix += encode(step.text)
    return rows


def _context(solver: Solver, problem: str, start: list[int]) -> ProblemContext:
    config = replace(solver.config, detail=True)  # attention is read whatever is weighed now
    engines = solver.pair.engines_for(config)
    prompt = engines["target"].tokenizer.encode_prompt(
        problem, config.system_prompt, config.thinking
    )
    context = ProblemContext(engines, prompt, problem_key(problem), config)
    context.append(start)
    return context


async def _judged_step(
    solver: Solver, problem: str, prefix: list[int], index: int
) -> tuple[str, Mapping[str, float]]:
    """The draft's selected step behind a prefix, and the verifier's signals of it."""
    config = solver.config
    context = _context(solver, problem, prefix)
    context.step = index
    try:
        embeddings = solver.pair.embedder_for(config) == "draft"
        candidates = await context.generate(
            "draft", config.step_sampling, config.num_candidates, embeddings=embeddings
        )
        selection = select_medoid(candidates, solver.embedder(config))
        selected = candidates[selection.index]
        capture = context.capture(config.verifier)
        [seen] = await context.score(config.verifier.model, [selected.token_ids], capture)
        consistency = selection.similarities[selection.index]
        verdict = verify(seen, capture, consistency, context.pieces_of(selected), config.verifier)
        return selected.text, dict(verdict.signals)
    finally:
        context.release()


async def _answer_from(solver: Solver, problem: str, start: list[int]) -> str | None:
    """The answer that the target reaches from these tokens on."""
    context = _context(solver, problem, start)
    text = context.tokenizer.decode(start)
    try:
        while final_answer(context.said(text) or "") is None and context.room > 0:
            [step] = await context.generate("target", GREEDY)
            context.append(step.token_ids)
            context.step += 1
            text = context.tokenizer.decode(context.token_ids[len(context.prompt.token_ids) :])
            if step.finish == "eos" or context.step == solver.config.max_steps:
                break
    finally:
        context.release()
    return final_answer(context.said(text) or "")

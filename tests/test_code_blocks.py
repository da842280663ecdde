"""A fenced block of code is one step, whatever blank lines stand in it."""

from dataclasses import replace

import pytest

from specguard.core import (
    ALL_FEATURES,
    GenerateJob,
    Observation,
    ScoreJob,
    SolveConfig,
    Solver,
    TokensDrawn,
    VerifierConfig,
)
from specguard.core.text import opens_code_block
from tests.scripted import EOS, Scripted

INTRO, CODE, END = "Like this:\n\n", "```python\na = 1\n\nb = 2\n\n\nc = 3\n```\n\n", "Done.$"
TEXT = INTRO + CODE + "Done."
LOG_PROB = VerifierConfig(weights={"log_prob": 1.0}, bounds={"log_prob": (-2.0, 0.0)})


def reciting(name: str, text: str = INTRO + CODE + END, **more: object) -> Scripted:
    """An engine that goes on with a text from where its prefix is, up to the delimiter."""

    def write(job: GenerateJob) -> list[str]:
        written = job.prefix[job.prefix.index(2) + 1 :]
        rest = text[len(written) :]
        end = rest.find("\n\n") + 2
        return [rest if end < 2 else rest[:end]] * job.num_candidates

    return Scripted(name, write, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["target", "draft", "specguard"])
def test_a_block_is_one_step_by_whoever_writes_it(method: str) -> None:
    config = SolveConfig(method=method, verifier=LOG_PROB, num_candidates=2)  # type: ignore[arg-type]
    solver = Solver(reciting("d"), reciting("t"), config)
    events: list[TokensDrawn] = []
    solution = solver.solve(
        "p", on_progress=lambda event: isinstance(event, TokensDrawn) and events.append(event)
    )
    assert [step.text for step in solution.steps] == [INTRO, CODE, "Done."]
    assert solution.text == TEXT
    told = "".join(e.text for e in events if e.step == 1 and e.candidate == 0)
    assert told == CODE


def test_a_rewrite_of_a_block_is_one_step_too() -> None:
    draft = reciting("d", f"{INTRO}```\nx\n\ny\n```\n\n")
    target = reciting("t", logprobs={"```\nx\n\ny\n```\n\n": -1.9})
    solution = Solver(draft, target, SolveConfig(verifier=LOG_PROB, max_steps=2)).solve("p")
    assert [step.text for step in solution.steps] == [INTRO, CODE]
    assert solution.steps[1].decision == "rewritten"
    assert solution.steps[1].draft_text == "```\nx\n\ny\n```\n\n"
    assert solution.steps[1].num_tokens == len(CODE)


def test_a_block_that_is_longer_than_a_step_is_cut_by_its_length_alone() -> None:
    config = SolveConfig(method="target", max_step_tokens=20)
    solution = Solver(None, reciting("t"), config).solve("p")
    assert [step.text for step in solution.steps] == [INTRO, CODE[:20], CODE[20:], "Done."]


class Certain(Scripted):
    """Knows which token follows in the text, and no other."""

    async def score(self, job: ScoreJob) -> list[Observation]:
        written = len(job.prefix) - job.prefix.index(2) - 1
        following = [*map(ord, TEXT[written:]), *[EOS] * 9]
        return [
            replace(seen, choices=tuple(following[: len(token_ids) + 1]))
            for seen, token_ids in zip(await super().score(job), job.continuations, strict=True)
        ]


@pytest.mark.parametrize("num_speculated", [1, 3, 8])
def test_guessed_tokens_make_one_step_of_a_block(num_speculated: int) -> None:
    draft, target = (
        Certain(name, reciting(name).script, features=ALL_FEATURES) for name in ("d", "t")
    )
    config = SolveConfig(method="sd", num_speculated=num_speculated)
    solution = Solver(draft, target, config).solve("p")
    assert [step.text for step in solution.steps] == [INTRO, CODE, "Done."]


def test_fences_open_and_close() -> None:
    assert opens_code_block("a\n```python\nb")
    assert not opens_code_block("a ``` b\n    ```\n")
    assert not opens_code_block("```\na\n```\n\n")
    assert opens_code_block("a\n", is_open=True)
    assert not opens_code_block("a\n  ~~~\n", is_open=True)

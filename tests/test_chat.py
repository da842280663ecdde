"""``specguard chat``: turns, what is kept of them, and how it ends."""

from typing import Any

import pytest
from click.testing import CliRunner, Result

from specguard.cli.main import main
from specguard.core import GenerateJob, SolveConfig, Solver
from tests.scripted import Scripted
from tests.serving import PROBLEM, tiny

OTHER = "Leo has 12 coins. Leo finds 5 more coins. How many coins does Leo have?"


@pytest.fixture
def converse(monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(solver: Solver, *lines: str, options: tuple[str, ...] = ()) -> Result:
        monkeypatch.setattr("specguard.cli.model_options.load", lambda *_, **__: solver)
        given = "".join(f"{line}\n" for line in lines)
        return CliRunner().invoke(main, ["chat", *options], input=given)

    return run


def recalling() -> Scripted:
    """Says what it has read."""

    def write(job: GenerateJob) -> list[str]:
        text = "".join(map(chr, job.prefix))
        return [f"I read {text!r}.$"]

    return Scripted("t", write)


def test_the_built_in_pair_solves_one_problem_a_turn(converse: Any) -> None:
    result = converse(tiny(), PROBLEM, "What is pi?", "", OTHER, "/exit", PROBLEM)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("Answer: ") == 2
    assert "Answer: 33" in result.stdout
    assert "Answer: 17" in result.stdout
    assert 'does not know the word "pi"' in result.stderr
    assert "each turn is one of its own" in result.stderr


def test_earlier_turns_are_context_until_they_are_cleared(converse: Any) -> None:
    solver = Solver(None, recalling(), SolveConfig(method="target"))
    options = ("--draft", "d", "--target", "t")
    result = converse(solver, "first", "second", "/clear", "third", options=options)
    assert result.exit_code == 0, result.stderr
    answers = [line for line in result.stdout.splitlines() if line.startswith("I read")]
    assert answers[0] == r"I read '\x01first\x02'."
    assert "User: first\\n\\nAssistant: I read" in answers[1]
    assert "second" in answers[1]
    assert answers[2] == r"I read '\x01third\x02'."


def test_force_means_nothing_for_pairs_that_take_anything(converse: Any) -> None:
    result = converse(tiny(), options=("--force", "--draft", "d", "--target", "t"))
    assert result.exit_code == 2
    assert "--force has no meaning" in result.stderr


def test_an_error_ends_its_turn_alone(converse: Any) -> None:
    target = recalling()
    target.context_limit = 20
    solver = Solver(None, target, SolveConfig(method="target"))
    options = ("--draft", "d", "--target", "t")
    result = converse(solver, "x" * 30, "ok", options=options)
    assert result.exit_code == 0
    assert "context window" in result.stderr
    assert "I read" in result.stdout

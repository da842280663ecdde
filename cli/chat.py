"""``specguard chat``: a conversation in a terminal, each turn step by step."""

import sys
from contextlib import suppress
from dataclasses import replace
from typing import Any

import click

from specguard import UsageError
from specguard.cli.method_options import method_options, settings_from
from specguard.cli.model_options import ModelOptions, model_options
from specguard.cli.output import Reporter
from specguard.core import Solver, SpecguardError
from specguard.core.conversation import Turn, encode_conversation
from specguard.core.text import after_thinking

_EXIT, _CLEAR = ("/exit", "/quit"), "/clear"
_HINT = "/exit or Ctrl-D ends, /clear forgets earlier turns, Ctrl-C stops an answer."


@click.command()
@click.option("--force", is_flag=True, help="Converse with the built-in pair, too.")
@model_options
@method_options
def chat(models: ModelOptions, reward: str | None, force: bool, **options: Any) -> None:
    """Converse with a pair, turn by turn; earlier turns are context.

    Lines are turns, from standard input where it is no terminal. /clear forgets earlier turns.
    """
    reporter = Reporter()
    with reporter.loading() as progress:
        choice = models.choose()
        check = choice.pair.check if choice.pair else None
        if force and check is None:
            raise UsageError("--force has no meaning: these models take anything")
        settings = settings_from({**options, "reward": reward}, choice)
        solver = replace(models, pair=choice.pair.name if choice.pair else None).load(
            reward=reward, progress=progress, **settings
        )
    reporter.start(solver, choice)
    is_single = check is not None and not force
    reporter.err.print(_HINT, style="dim", markup=False)
    if is_single:
        reporter.err.print(
            "This pair knows single problems: each turn is one of its own.", style="dim"
        )
    turns: list[Turn] = []
    while (said := _next_turn()) is not None:
        if said == _CLEAR:
            turns.clear()
        elif said:
            try:
                if is_single and check is not None:
                    check(said)
                    turns.clear()
                turns = _answered(solver, [*turns, {"role": "user", "content": said}], reporter)
            except SpecguardError as error:
                hint = f" ({error.hint})" if error.hint else ""
                reporter.err.print(f"{error.message}{hint}", style="yellow", markup=False)
            except KeyboardInterrupt:
                reporter.err.print("Stopped.", style="dim")


def _next_turn() -> str | None:
    """What is said next, None at the end."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):  # it is not everywhere
            import readline  # noqa: F401 - makes a line of `input` that can be edited
    try:
        said = input("> " if is_terminal else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    except UnicodeDecodeError as error:
        raise UsageError("standard input is not valid UTF-8") from error
    return None if said in _EXIT else said


def _answered(solver: Solver, turns: list[Turn], reporter: Reporter) -> list[Turn]:
    """The conversation with the answer to its last turn, which is shown step by step."""
    tokenizer = solver.pair.tokenizer_for(solver.config)
    problem, prompt = encode_conversation(tokenizer, turns, solver.config)
    with (
        reporter.solving(solver.config.method) as hear,
        solver.stream(problem, on_progress=hear, prompt=prompt) as steps,
    ):
        for step in steps:
            reporter.step(step, solver.config)
    assert steps.solution is not None
    reporter.finish(steps.solution)
    text = after_thinking(steps.solution.text) or steps.solution.text
    return [*turns, {"role": "assistant", "content": text.strip()}]

"""What a person sees: steps and answer on stdout, progress and statistics on stderr."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from specguard.cli.status import Loading, Solving, StatusLine
from specguard.core import PhaseBegan, Solver
from specguard.core import Progress as Event
from specguard.core.config import Method, SolveConfig
from specguard.core.records import Solution, StepRecord
from specguard.loading import Choice
from specguard.wording import acceptance, drafted, label, misfit, no_answer, verdict

_STYLES = {"accepted": "green", "rewritten": "yellow", "plain": "cyan"}


def console(stderr: bool = False) -> Console:
    """A console that drops colour without a terminal or with NO_COLOR, and never wraps pipes."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=10_000)


def print_notes(solver: Solver, err: Console) -> None:
    """What the user should know of the engines and of what they lack."""
    for note in solver.notes:
        err.print(f"{escape(note)}.", style="dim")


def progress_bar(err: Console, is_shown: bool = True) -> Progress:
    """How many of a known number are done, in a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=err, disable=not (is_shown and err.is_terminal))


class Reporter:
    """Shows a solution while it is made; a silent one prints nothing of it.

    On a terminal a line at the bottom says what is going on. Where data goes to the same terminal
    and nothing else is to be on it (``is_silent``), there is none.
    """

    def __init__(self, is_silent: bool = False, is_quiet: bool = False) -> None:
        self.is_silent = is_silent or is_quiet
        self.is_quiet = is_quiet
        self.out = console()
        self.err = console(stderr=True)
        is_shown = not is_quiet and not (is_silent and self.out.is_terminal)
        self.status = StatusLine(self.err, is_shown)

    @contextmanager
    def loading(self) -> Iterator[Callable[[str], None]]:
        """Say what is loaded; yields what to call with each model's name."""
        progress = Loading()

        def begin(source: str) -> None:
            progress.begin(source)
            self.status.show(progress.parts)

        with self.status as status:
            status.show(progress.parts)
            yield begin

    @contextmanager
    def solving(self, method: Method) -> Iterator[Callable[[Event], None] | None]:
        """Say what is done; yields what to call with every event, None where nobody looks."""
        if not self.status.is_live:
            yield None
            return
        progress = Solving(method)

        def hear(event: Event) -> None:
            progress.hear(event)
            if isinstance(event, PhaseBegan):
                self.status.show(progress.parts)

        with self.status as status:
            status.show(progress.parts)
            yield hear

    def start(self, solver: Solver, choice: Choice) -> None:
        """Hints that belong before the first step."""
        if self.is_silent:
            return
        config = solver.config
        if choice.is_fallback:
            self.err.print(
                "Built-in pair: it knows grade-school word problems only. For a real one: "
                "specguard models",
                style="dim",
            )
        if config.method == "specguard" and not config.verifier.is_calibrated:
            self.err.print(
                Text(
                    "Uncalibrated: no verifier is fitted to this pair. To fit one: "
                    f"{_calibration(choice)}",
                    style="yellow",
                )
            )
        print_notes(solver, self.err)

    def step(self, step: StepRecord, config: SolveConfig) -> None:
        """One step: who wrote it, why it stands there, its text as it is."""
        self.status.hide()
        if self.is_silent:
            return
        if step.index:
            self.out.print()
        style = f"bold {_STYLES[step.decision]}"
        said = verdict(step, config) or f"{step.num_tokens} tokens"
        heading = Text.assemble((f"[{step.index + 1}] {label(step)}", style), (f"  {said}", "dim"))
        self.out.print(heading)
        if (draft := drafted(step)) is not None:
            draft = " ".join(draft.split()) or "(nothing)"
            self.out.print(Text(f"draft: {draft}", style="dim strike"))
        self.out.print(Text(step.text.strip()))

    def finish(self, solution: Solution) -> None:
        """The answer on stdout and statistics on stderr."""
        if solution.answer is not None:
            said = "Answer" if solution.answer_source == "box" else "Answer (last text, no box)"
            self.out.print()
            self.out.print(Text(f"{said}: {solution.answer}", style="bold"))
        stats = solution.stats
        parts = [
            f"{stats.seconds:.2f} s",
            f"{stats.num_tokens} tokens",
            f"{stats.tokens_per_second:.1f} tokens/s",
        ]
        accepted = acceptance(solution)
        if accepted is not None:
            parts += [accepted, f"target wrote {stats.num_target_tokens} tokens"]
            if stats.num_reused_tokens:
                parts[-1] += f" and kept {stats.num_reused_tokens} of rejected steps"
        if stats.num_guessed_tokens:
            share = stats.num_kept_tokens / stats.num_guessed_tokens
            parts.append(f"kept {share:.0%} of {stats.num_guessed_tokens} guessed tokens")
        if stats.num_spared_candidates:
            parts.append(f"{stats.num_spared_candidates} candidates spared")
        if stats.num_fallback_steps:
            parts.append(f"{stats.num_fallback_steps} steps without a draft, which did not pay")
        self.err.print(" | ".join(parts), style="dim")
        complaint = misfit(solution)
        if complaint is not None:
            self.err.print(complaint, style="yellow")

    def no_answer(self, solution: Solution) -> None:
        """Why there is none and what to do, whatever else is printed."""
        reason, advice = no_answer(solution)
        self.err.print(f"No answer: {reason}.", markup=False)
        self.err.print(f"Hint: {advice}", markup=False)


def _calibration(choice: Choice) -> str:
    """The command that fits a verifier to what was chosen."""
    words = ["specguard", "calibrate", "NAME", "--data", "FILE"]
    pair, models = choice.pair, (choice.draft, choice.target)
    if pair is not None:
        words += ["--models", pair.name]
    if pair is None or all(models != pair.sources(weights) for weights in pair.draft):
        words += ["--draft", str(choice.draft), "--target", str(choice.target)]
    return shlex.join(words)

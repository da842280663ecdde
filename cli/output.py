"""What a person sees: steps and answer on stdout, progress and statistics on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from specguard.core import Solver
from specguard.core.records import Solution, StepRecord
from specguard.loading import Choice

_SHOWN_SCORES = ("log_prob", "grounding", "consistency", "reward")


def console(stderr: bool = False) -> Console:
    """A console that drops colour without a terminal or with NO_COLOR, and never wraps pipes."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=10_000)


def print_notes(solver: Solver, err: Console) -> None:
    """What the user should know of the engines and of what they lack."""
    for note in solver.notes:
        err.print(f"{escape(note)}.", style="dim")


class Reporter:
    """Shows a solution while it is made; a silent one shows nothing."""

    def __init__(self, is_silent: bool) -> None:
        self.is_silent = is_silent
        self.out = console()
        self.err = console(stderr=True)

    @contextmanager
    def loading(self) -> Iterator[Callable[[str], None]]:
        """A spinner on stderr while models load; yields what to call with each one's name."""
        if self.is_silent or not self.err.is_terminal:
            yield lambda _: None
            return
        with self.err.status("loading") as status:
            yield lambda name: status.update(f"loading {escape(name)}")

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
                "Uncalibrated: no verifier bounds are fitted to this pair, conservative ones are "
                "used.",
                style="yellow",
            )
        print_notes(solver, self.err)

    def step(self, step: StepRecord) -> None:
        """One step: who wrote it, its text, its scores."""
        if self.is_silent:
            return
        style, label = {
            "accepted": ("green", "accepted draft"),
            "rewritten": ("yellow", "rewritten by target"),
            "plain": ("cyan", f"{step.author}, no draft" if step.is_fallback else step.author),
        }[step.decision]
        self.out.print(Text(f"[{step.index + 1}] {label}", style=f"bold {style}"), end="")
        self.out.print(Text(f"  {_scores(step)}", style="dim"))
        if step.draft_text is not None:
            self.out.print(Text(f"    draft: {_one_line(step.draft_text)}", style="dim strike"))
        self.out.print(Text(f"    {step.text.strip()}".replace("\n", "\n    ")))

    def finish(self, solution: Solution) -> None:
        """The answer on stdout and one line of statistics on stderr."""
        if solution.answer is None:
            self.out.print(f"No answer: finished by {solution.finish_reason}.")
        else:
            self.out.print(Text(f"Answer: {solution.answer}", style="bold"))
        stats = solution.stats
        parts = [
            f"{stats.seconds:.2f} s",
            f"{stats.num_tokens} tokens",
            f"{stats.tokens_per_second:.1f} tokens/s",
        ]
        if stats.step_acceptance_rate is not None and stats.token_acceptance_rate is not None:
            parts += [
                f"accepted {stats.num_accepted_steps}/{stats.num_steps} steps "
                f"({stats.step_acceptance_rate:.0%}), {stats.token_acceptance_rate:.0%} of tokens",
                f"target wrote {stats.num_target_tokens} tokens",
            ]
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


def _scores(step: StepRecord) -> str:
    if not step.scores:
        return f"{step.num_tokens} tokens"
    shown = [
        f"{name.replace('_', '-')} {step.scores[name]:.2f}"
        for name in _SHOWN_SCORES
        if name in step.scores
    ]
    relation = ">=" if step.decision == "accepted" else "<"
    return f"{', '.join(shown)}: ensemble {step.scores['ensemble']:.2f} {relation} {step.threshold}"


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"

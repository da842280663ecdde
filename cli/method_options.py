"""The options that say how a problem is solved, and the settings that they become."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, get_args

import click

from specguard.cli.values import CANDIDATES, COUNT, GUESSES, SEED, SHARE, Number
from specguard.core import DraftCost
from specguard.core.config import (
    PAPER_CANDIDATES,
    PRESETS,
    TARGET_SELECTOR,
    Method,
    ensemble_weights,
)
from specguard.core.engine import Sampling
from specguard.core.errors import UsageError
from specguard.loading import Choice, configure

F = TypeVar("F", bound=Callable[..., Any])

# Options that only some methods have a use for, by parameter name.
_SPECGUARD, _STEPWISE = ("specguard",), ("specguard", "rsd")
LIMITED = {
    "num_candidates": ("--k", _STEPWISE),
    "num_first_candidates": ("--first-k", _STEPWISE),
    "preset": ("--preset", _SPECGUARD),
    "beta": ("--beta", _SPECGUARD),
    "threshold": ("--threshold", _STEPWISE),
    "verifier": ("--verifier", _SPECGUARD),
    "sources": ("--sources", _SPECGUARD),
    "selector": ("--selector", _STEPWISE),
    "rewrite_temperature": ("--rewrite-temperature", _STEPWISE),
    "num_speculated": ("--speculate", ("sd", *_STEPWISE)),
    "reward": ("--reward", ("rsd",)),
    "no_fallback": ("--no-fallback", _STEPWISE),
    "draft_cost": ("--draft-cost", ("sd", *_STEPWISE)),
}
# Options that are fields of `SolveConfig` as they stand.
UNCHANGED = (
    "method",
    "num_candidates",
    "num_first_candidates",
    "num_speculated",
    "selector",
    "max_tokens",
    "max_step_tokens",
    "max_steps",
    "delimiter",
    "system_prompt",
    "thinking",
    "seed",
)


def method_options(command: F) -> F:
    """How a problem is solved."""
    for option in reversed(
        (
            click.option(
                "--method",
                type=click.Choice(list(get_args(Method))),
                default="specguard",
                help="Step-level speculation, the same by a reward model's judgement (rsd), plain "
                "decoding by one model, or token-level speculation (sd).",
            ),
            click.option(
                "--k",
                "num_candidates",
                type=CANDIDATES,
                show_default="1; 16 with --preset",
                help="Candidate steps per step.",
            ),
            click.option(
                "--first-k",
                "num_first_candidates",
                type=CANDIDATES,
                show_default="all at once",
                help="Candidates drawn first; the others only where these disagree.",
            ),
            click.option(
                "--reward",
                metavar="MODEL",
                help="Process reward model of --method rsd, in place of the pair's.",
            ),
            click.option(
                "--no-fallback",
                is_flag=True,
                default=None,
                help="Draft every step, even while that is slower than the target alone.",
            ),
            click.option(
                "--draft-cost",
                metavar="FIGURES",
                help="What drafting costs, as a record has it, in the target's tokens: candidate, "
                "further, verification, reading, separated by commas; or measure: anew.",
            ),
            click.option(
                "--temperature",
                type=Number(0),
                show_default="0.7 for several candidates, else 0: greedy",
                help="Of the draft's candidates, or of plain decoding.",
            ),
            click.option(
                "--top-p",
                type=Number(0, 1, min_open=True),
                show_default="0.8 for several candidates",
                help="Likewise.",
            ),
            click.option(
                "--preset",
                type=click.Choice(list(PRESETS)),
                help="A named verifier in place of the pair's own.",
            ),
            click.option(
                "--beta",
                type=SHARE,
                show_default="the pair's",
                help="Weight of log-prob; the rest is grounding.",
            ),
            click.option(
                "--threshold",
                type=SHARE,
                show_default="the pair's; 0.7",
                help="Score from which a step is accepted.",
            ),
            click.option(
                "--verifier",
                type=click.Choice(["draft", "target"]),
                show_default="the pair's; target",
                help="Who verifies.",
            ),
            click.option(
                "--sources",
                type=click.Choice(["problem", "context"]),
                show_default="problem",
                help="What counts as ground: problem and accepted steps, or all context.",
            ),
            click.option(
                "--selector",
                metavar="SELECTOR",
                help="Of the candidates the most consistent one, by draft, ngram, numbers or "
                "sentence-transformers:NAME; or target: the one that it scores highest.",
                show_default="the pair's; target",
            ),
            click.option(
                "--rewrite-temperature",
                type=Number(0),
                show_default="0: greedy",
                help="Of the target's rewrites.",
            ),
            click.option(
                "--speculate",
                "num_speculated",
                type=GUESSES,
                show_default="as many as pay here",
                help="Tokens that the draft guesses ahead where the target writes; 0: none.",
            ),
            click.option(
                "--max-tokens",
                type=COUNT,
                show_default="2048; with thinking, the context window",
                help="Most tokens of a solution.",
            ),
            click.option(
                "--max-step-tokens",
                type=COUNT,
                show_default="256",
                help="Most tokens of a step.",
            ),
            click.option(
                "--max-steps",
                type=COUNT,
                show_default="any number",
                help="Most steps of a solution.",
            ),
            click.option("--delimiter", show_default="a blank line", help="Text that ends a step."),
            click.option(
                "--system-prompt",
                metavar="TEXT",
                help='In place of the pair\'s own, or of one that asks for steps and a box; "": '
                "none.",
            ),
            click.option(
                "--thinking", is_flag=True, default=None, help="Switch a template's thinking on."
            ),
            click.option("--seed", type=SEED, show_default="0", help="Of all sampling."),
        )
    ):
        command = option(command)
    return command


def check_unicode(text: str, name: str) -> None:
    """Refuse an argument whose bytes were not UTF-8.

    Raises:
        UsageError: it holds stand-ins for such bytes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name} is not valid UTF-8") from error


def settings_from(options: Mapping[str, Any], choice: Choice) -> dict[str, Any]:
    """Changes to what is configured for these models that the method options ask for.

    Raises:
        UsageError: an impossible value, or an option that the method has no use for.
    """
    given = {name: value for name, value in options.items() if value is not None}
    base = configure(choice, thinking=True) if "thinking" in given else configure(choice)
    check_unicode(given.get("system_prompt", ""), "--system-prompt")
    for name, (flag, methods) in LIMITED.items():
        if name in given and given["method"] not in methods:
            raise UsageError(
                f"{flag} has no meaning with --method {given['method']}",
                f"leave it out, or use --method {' or '.join(methods)}",
            )
    changes = {name: given[name] for name in UNCHANGED if name in given}
    first, most = given.get("num_first_candidates"), given.get("num_candidates")
    if first is not None and not 2 <= first <= (most or base.num_candidates):
        raise UsageError(
            f"--first-k must be from 2 to --k, {most or base.num_candidates}, not {first}",
            "give --k too, and a larger one",
        )
    changes |= _draft_cost(given)
    if given["method"] == "rsd":
        if "threshold" in given:
            changes["reward_threshold"] = given.pop("threshold")
        # One greedy candidate is the published method; several are for whoever asks for them.
        changes.setdefault("num_candidates", 1)
        if changes.setdefault("selector", "draft") == TARGET_SELECTOR:
            raise UsageError(
                "the target does not select with --method rsd", "choose another --selector"
            )
    if "temperature" in given or "top_p" in given:
        usual = replace(base, method=given["method"]).step_sampling
        changes["sampling"] = Sampling(
            given.get("temperature", usual.temperature), given.get("top_p", usual.top_p)
        )
        if "top_p" in given and changes["sampling"].is_greedy:
            raise UsageError("--top-p has no meaning at temperature 0", "give --temperature too")
    if "rewrite_temperature" in given:
        changes["rewrite_sampling"] = Sampling(given["rewrite_temperature"], 1.0)
    verifier = _verifier(given)
    if verifier:
        changes["verifier"] = verifier
    if "preset" in given:  # the paper's method: the medoid of 16 candidates
        changes = {**PAPER_CANDIDATES, **changes}
    # Where the target does not verify, it cannot select.
    elif verifier.get("model", base.verifier.model) != "target" and (
        base.selector == TARGET_SELECTOR
    ):
        changes.setdefault("selector", "draft")
    return changes


def _draft_cost(given: Mapping[str, Any]) -> dict[str, Any]:
    if "no_fallback" in given and "draft_cost" in given:
        raise UsageError("--no-fallback and --draft-cost exclude one another")
    if "no_fallback" in given:
        return {"draft_cost": None}
    if "draft_cost" not in given:
        return {}
    if given["draft_cost"] == "measure":
        return {"remeasure": True}
    try:
        figures = [float(figure) for figure in given["draft_cost"].split(",")]
    except ValueError:
        figures = []
    if not 1 <= len(figures) <= 4:
        raise UsageError(
            f"--draft-cost must be one to four numbers, or measure, not {given['draft_cost']!r}"
        )
    return {"draft_cost": DraftCost(*figures)}


def _verifier(given: Mapping[str, Any]) -> dict[str, Any]:
    """Changes to the pair's own."""
    if "preset" in given and "beta" in given:
        raise UsageError("--preset and --beta exclude one another")
    changes: dict[str, Any] = dict(PRESETS[given["preset"]]) if "preset" in given else {}
    if "beta" in given:
        changes["weights"] = ensemble_weights(given["beta"])
    for name, field in (
        ("threshold", "threshold"),
        ("verifier", "model"),
        ("sources", "sources"),
    ):
        if name in given:
            changes[field] = given[name]
    return changes

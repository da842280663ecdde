"""Option groups that several commands share, and how they become settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any, TypeVar, get_args

import click

from specguard.core import RewardModel, Solver
from specguard.core.config import (
    PRESETS,
    TARGET_SELECTOR,
    Method,
    SolveConfig,
    VerifierConfig,
    ensemble_weights,
)
from specguard.core.engine import Sampling
from specguard.core.errors import UsageError
from specguard.loading import Choice, choose, load, load_reward

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
    "num_speculated": ("--speculate", ("sd",)),
    "reward": ("--reward", ("rsd",)),
    "no_fallback": ("--no-fallback", _STEPWISE),
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


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which models to load, and where, as the options say."""

    pair: str | None
    draft: str | None
    target: str | None
    backend: str
    draft_backend: str | None
    dtype: str
    trust_remote_code: bool
    profile: str | None

    def choose(self) -> Choice:
        """What will be loaded."""
        return choose(self.pair, self.backend, self.draft, self.target, self.draft_backend)

    def load(self, **more: Any) -> Solver:
        """The models with settings."""
        return load(
            self.pair,
            backend=self.backend,
            draft_backend=self.draft_backend,
            draft=self.draft,
            target=self.target,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            profile=self.profile,
            **more,
        )

    def load_reward(self, reward: str | None) -> RewardModel:
        """The process reward model that was named, or the pair's."""
        pair = self.choose().pair
        return load_reward(pair, reward, self.backend, self.dtype, self.trust_remote_code)


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Which models to load, and where: the command's parameter ``models``."""

    @wraps(command)
    def with_models(**options: Any) -> None:
        given = {field.name: options.pop(field.name) for field in fields(ModelOptions)}
        command(models=ModelOptions(**given), **options)

    wrapped: Callable[..., None] = with_models
    for option in reversed(
        (
            click.option(
                "--models", "pair", metavar="PAIR", help="Model pair, see specguard models."
            ),
            click.option(
                "--draft", metavar="MODEL", help="Draft: a folder or a downloaded hub id."
            ),
            click.option("--target", metavar="MODEL", help="Target: likewise."),
            click.option(
                "--backend",
                default="auto",
                show_default=True,
                metavar="[auto|mlx|cuda|cuda:N|mps|cpu]",
                help="Where to run, see specguard backends.",
            ),
            click.option(
                "--draft-backend",
                metavar="BACKEND",
                help="Where the draft runs, if elsewhere than the target.",
            ),
            click.option(
                "--dtype",
                type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
                default="auto",
                show_default=True,
                help="Number type of the weights.",
            ),
            click.option(
                "--profile", metavar="NAME", help="A fitted verifier, see specguard calibrate."
            ),
            click.option(
                "--trust-remote-code",
                is_flag=True,
                help="Run Python code that comes with a checkpoint.",
            ),
        )
    ):
        wrapped = option(wrapped)
    return wrapped


def method_options(command: F) -> F:
    """How a problem is solved."""
    for option in reversed(
        (
            click.option(
                "--method",
                type=click.Choice(list(get_args(Method))),
                default="specguard",
                show_default=True,
                help="Step-level speculation, the same by a reward model's judgement (rsd), plain "
                "decoding by one model, or token-level speculation (sd).",
            ),
            click.option("--k", "num_candidates", type=int, help="Candidate steps per step."),
            click.option(
                "--first-k",
                "num_first_candidates",
                type=int,
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
                "--temperature", type=float, help="Of the draft's candidates, or of plain decoding."
            ),
            click.option("--top-p", type=float, help="Likewise."),
            click.option(
                "--preset",
                type=click.Choice(list(PRESETS)),
                help="A named verifier in place of the pair's own.",
            ),
            click.option("--beta", type=float, help="Weight of log-prob; the rest is grounding."),
            click.option("--threshold", type=float, help="Score from which a step is accepted."),
            click.option(
                "--verifier", type=click.Choice(["draft", "target"]), help="Who verifies."
            ),
            click.option(
                "--sources",
                type=click.Choice(["problem", "context"]),
                help="What counts as ground: problem and accepted steps, or all context.",
            ),
            click.option(
                "--selector",
                metavar="SELECTOR",
                help="Of the candidates the most consistent one, by draft, ngram, numbers or "
                "sentence-transformers:NAME; or target: the one that it scores highest.",
            ),
            click.option(
                "--rewrite-temperature", type=float, help="Of the target's rewrites [0: greedy]."
            ),
            click.option(
                "--speculate",
                "num_speculated",
                type=int,
                help="Tokens that the draft guesses ahead in --method sd [4].",
            ),
            click.option("--max-tokens", type=int, help="Most tokens of a solution."),
            click.option("--max-step-tokens", type=int, help="Most tokens of a step."),
            click.option("--max-steps", type=int, help="Most steps of a solution."),
            click.option("--delimiter", help="Text that ends a step [a blank line]."),
            click.option("--system-prompt", help="In place of the pair's own."),
            click.option(
                "--thinking", is_flag=True, default=None, help="Switch a template's thinking on."
            ),
            click.option("--seed", type=int, help="Of all sampling [0]."),
        )
    ):
        command = option(command)
    return command


def numbers(text: str, flag: str, kind: type[Any]) -> list[Any]:
    """Numbers separated by commas, each once.

    Raises:
        UsageError: something else.
    """
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError as error:
        raise UsageError(f"{flag} must be numbers separated by commas, not {text!r}") from error


def check_unicode(text: str, name: str) -> None:
    """Refuse an argument whose bytes were not UTF-8.

    Raises:
        UsageError: it holds stand-ins for such bytes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name} is not valid UTF-8") from error


def settings_from(options: Mapping[str, Any], base: SolveConfig) -> dict[str, Any]:
    """Changes to ``base`` that the method options ask for.

    Raises:
        UsageError: an impossible value, or an option that the method has no use for.
    """
    given = {name: value for name, value in options.items() if value is not None}
    check_unicode(given.get("system_prompt", ""), "--system-prompt")
    for name, (flag, methods) in LIMITED.items():
        if name in given and given["method"] not in methods:
            raise UsageError(
                f"{flag} has no meaning with --method {given['method']}",
                f"leave it out, or use --method {' or '.join(methods)}",
            )
    changes = {name: given[name] for name in UNCHANGED if name in given}
    if "no_fallback" in given:
        changes["draft_cost"] = None
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
    verifier = _verifier(given, base.verifier)
    if given.keys() & {"preset", "beta", "threshold", "verifier", "sources"}:
        changes["verifier"] = verifier  # else what the engines lack may still change it
    # Presets are the paper's method, whose selector is the medoid; and where the target does not
    # verify, it cannot select.
    is_medoid = "preset" in given or verifier.model != "target"
    if "selector" not in given and base.selector == TARGET_SELECTOR and is_medoid:
        changes["selector"] = "draft"
    return changes


def _verifier(given: Mapping[str, Any], verifier: VerifierConfig) -> VerifierConfig:
    if "preset" in given and "beta" in given:
        raise UsageError("--preset and --beta exclude one another")
    changes: dict[str, Any] = dict(PRESETS[given["preset"]]) if "preset" in given else {}
    if "beta" in given:
        changes["weights"] = ensemble_weights(given["beta"])
    for name, field in ("threshold", "threshold"), ("verifier", "model"), ("sources", "sources"):
        if name in given:
            changes[field] = given[name]
    if changes.get("model", verifier.model) != verifier.model:
        changes["bounds"] = {}  # they were fitted to the other model's signals
    return replace(verifier, **changes)

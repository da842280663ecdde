"""Option groups that several commands share, and how they become settings."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any, TypeVar, get_args

import click

from specguard.backends.checkpoint import is_url
from specguard.cli.values import CANDIDATES, COUNT, GUESSES, SEED, SHARE, Number
from specguard.core import DraftCost, RewardModel, Solver
from specguard.core.config import (
    PAPER_CANDIDATES,
    PRESETS,
    TARGET_SELECTOR,
    Method,
    ensemble_weights,
)
from specguard.core.engine import Sampling
from specguard.core.errors import UsageError
from specguard.loading import Choice, choose, configure, load, load_reward
from specguard.models.pairs import pair_names
from specguard.models.profiles import profile_names

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


DTYPES = ("auto", "float32", "bfloat16", "float16", "int4")


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which models to load, and where, as the options say."""

    pair: str | None
    draft: str | None
    target: str | None
    draft_model: str | None
    target_model: str | None
    tokenizer: str | None
    backend: str
    draft_backend: str | None
    dtype: str
    draft_dtype: str | None
    engine_args: tuple[str, ...]
    trust_remote_code: bool
    profile: str | None

    def choose(self) -> Choice:
        """What will be loaded."""
        return choose(
            self.pair, self.backend, self.draft, self.target, self.draft_backend, self.profile
        )

    def load(self, **more: Any) -> Solver:
        """The models with settings."""
        return load(
            self.pair,
            backend=self.backend,
            draft_backend=self.draft_backend,
            draft=self.draft,
            target=self.target,
            dtype=self.dtype,
            draft_dtype=self.draft_dtype,
            engine_args={**self._server_args(), **_named(self.engine_args)},
            trust_remote_code=self.trust_remote_code,
            profile=self.profile,
            **more,
        )

    def _server_args(self) -> dict[str, str]:
        """Arguments of the engines behind URLs."""
        named = {"draft": self.draft_model, "target": self.target_model}
        found = {}
        for role, source in ("draft", self.draft), ("target", self.target):
            is_remote = source is not None and is_url(source)
            name = named[role]
            if name is not None and not is_remote:
                raise UsageError(f"--{role}-model is of a server: it needs --{role} URL")
            if name is not None:
                found[f"{role}.model"] = name
            if self.tokenizer is not None and is_remote:
                found[f"{role}.tokenizer"] = self.tokenizer
        if self.tokenizer is not None and not found:
            raise UsageError("--tokenizer is of a server's model: it needs a URL")
        return found

    def load_reward(self, reward: str | None) -> RewardModel:
        """The process reward model that was named, or the pair's."""
        pair = self.choose().pair
        return load_reward(pair, reward, self.backend, self.dtype, self.trust_remote_code)


def _one_source(
    context: click.Context, parameter: click.Parameter, given: tuple[str, ...]
) -> str | None:
    """A model, or the URLs of servers alike with commas between."""
    if len(given) > 1 and not all(map(is_url, given)):
        raise click.BadParameter("only URLs may be given several times", context, parameter)
    return ",".join(given) or None


def _named(arguments: tuple[str, ...]) -> dict[str, str]:
    named = {}
    for argument in arguments:
        name, sign, value = argument.partition("=")
        if not (name and sign):
            raise UsageError(f"--engine-arg must be NAME=VALUE, not {argument!r}")
        named[name.strip().replace("-", "_")] = value.strip()
    return named


def completing(names: Callable[[], Iterable[str]]) -> Callable[..., list[str]]:
    """What a shell offers for a value that is one of these names."""
    return lambda _, __, begun: [name for name in names() if name.startswith(begun)]


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
                "--models",
                "pair",
                metavar="PAIR",
                shell_complete=completing(pair_names),
                show_default="your choice, else one on this disk, else tiny",
                help="Model pair, see specguard models.",
            ),
            click.option(
                "--draft",
                metavar="MODEL",
                multiple=True,
                callback=_one_source,
                help="Draft: a folder, a GGUF file, a downloaded hub id, or a server's URL, "
                "several times for servers alike.",
            ),
            click.option(
                "--target",
                metavar="MODEL",
                multiple=True,
                callback=_one_source,
                help="Target: likewise.",
            ),
            click.option(
                "--draft-model",
                metavar="NAME",
                help="What the draft's server calls it, if it has several models.",
            ),
            click.option("--target-model", metavar="NAME", help="Likewise the target's."),
            click.option(
                "--tokenizer",
                metavar="FOLDER",
                help="Tokenizer of models behind URLs, where theirs is not on this disk.",
            ),
            click.option(
                "--backend",
                default="auto",
                metavar="[auto|mlx|cuda|cuda:N|mps|cpu|vllm|llamacpp]",
                help="Where to run, see specguard backends.",
            ),
            click.option(
                "--draft-backend",
                metavar="BACKEND",
                help="Where the draft runs, if elsewhere than the target.",
            ),
            click.option(
                "--dtype",
                type=click.Choice(DTYPES),
                default="auto",
                help="Number type of the weights; int4: rounded to 4 bits.",
            ),
            click.option(
                "--draft-dtype",
                type=click.Choice(DTYPES),
                show_default="what suits a draft",
                help="The draft's alone.",
            ),
            click.option(
                "--engine-arg",
                "engine_args",
                multiple=True,
                metavar="NAME=VALUE",
                help="An argument of vLLM or llama.cpp, for both models; draft.NAME or "
                "target.NAME: for one.",
            ),
            click.option(
                "--profile",
                metavar="NAME",
                shell_complete=completing(profile_names),
                show_default="one that fits the models, if there is one",
                help="A fitted verifier, see specguard profiles; none: without.",
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

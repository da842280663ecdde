"""The options that say which models to load, and where, and what they become."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any

import click

from specguard.backends.checkpoint import is_url
from specguard.core import RewardModel, Solver
from specguard.core.errors import UsageError
from specguard.loading import Choice, choose, load, load_reward
from specguard.models.pairs import pair_names
from specguard.models.profiles import profile_names

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

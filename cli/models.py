"""``specguard models``: list pairs and what fits here, show one, download some, choose one."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from filelock import FileLock, Timeout
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from specguard import SpecguardError, UsageError
from specguard.backends.checkpoint import split_revision
from specguard.backends.memory import ModelSize
from specguard.backends.registry import AUTO, choose_backend
from specguard.cli.groups import Group
from specguard.cli.model_options import completing
from specguard.cli.output import console
from specguard.models.needs import PairNeeds, pair_needs
from specguard.models.pairs import (
    BUILT_IN_PAIR,
    PROMPT_TOKENS,
    ModelPair,
    find_pair,
    pair_names,
    typical_tokens,
)
from specguard.models.profiles import choose_profile
from specguard.models.settings import choose_pair, chosen_pair

# Weights as safetensors, and what config, tokenizer and template need; never pickles or code.
_WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_WORDS = {True: "yes", False: "no", None: "?"}


@click.group(cls=Group, invoke_without_command=True)
@click.option(
    "--backend",
    default=AUTO,
    show_default=True,
    metavar="[auto|mlx|cuda|cuda:N|mps|cpu]",
    help="Where the pairs are to run.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of the table.")
@click.pass_context
def models(ctx: click.Context, backend: str, as_json: bool) -> None:
    """List model pairs: what they need, whether they fit here, whether they are on this disk."""
    if ctx.invoked_subcommand is not None:
        _refuse_options(ctx)
        return
    name, found, device = choose_backend(backend)
    backend = device or name
    choice = chosen_pair()
    chosen = find_pair(choice).name if choice is not None else None
    rows = [pair_needs(pair, found, device) for pair in map(find_pair, pair_names())]
    if as_json:
        pairs = [
            {**_described(needs, found.weights), "is_chosen": needs.pair.name == chosen}
            for needs in rows
        ]
        about = {"backend": backend, "weights": found.weights, "pairs": pairs}
        click.echo(json.dumps(about, indent=2, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("pair", "draft", "target", "memory", "fits", "on disk", "context"):
        table.add_column(heading, justify="left" if heading == "pair" else "right")
    for needs in rows:
        name = needs.pair.name
        table.add_row(
            escape(name) + (" *" if name == chosen else ""),
            *map(_parameters, needs.sizes or (None, None)),
            "?" if needs.num_bytes is None else decimal(needs.num_bytes),
            _WORDS[needs.fits],
            _WORDS[needs.is_on_disk],
            str(needs.pair.context_limit),
        )
    console().print(table)
    _explain(backend, rows, chosen)


def _explain(backend: str, rows: list[PairNeeds], chosen: str | None) -> None:
    memory = next((needs.place for needs in rows if needs.place is not None), None)
    free = "" if memory is None else f" ({decimal(memory.num_free_bytes)} free now)"
    usual, thinking = (PROMPT_TOKENS + typical_tokens(thinks) for thinks in (False, True))
    lines = [
        f"memory: of both models on {backend}{free} and of the keys and values of {usual} tokens, "
        f"{thinking} where they always think",
        "which models, which settings: specguard models show NAME",
    ]
    if chosen is not None:
        lines.append("* your choice (specguard models use NAME)")
    for line in lines:
        console(stderr=True).print(line, style="dim")


def _described(needs: PairNeeds, weights: str) -> dict[str, Any]:
    pair = needs.pair
    draft, target = pair.sources(weights) if weights in pair.draft else (None, None)
    sizes = needs.sizes
    return {
        "name": pair.name,
        "description": pair.description,
        "draft": draft,
        "target": target,
        "parameters": None if sizes is None else [size.num_parameters for size in sizes],
        "weight_bytes": needs.num_weight_bytes,
        "cache_bytes": needs.num_cache_bytes,
        "cached_tokens": needs.num_tokens,
        "fits": needs.fits,
        "is_on_disk": needs.is_on_disk,
        "context_limit": pair.context_limit,
        "system_prompt": pair.system_prompt,
        "thinking": pair.thinking,
    }


def _parameters(size: ModelSize | None) -> str:
    if size is None:
        return "?"
    billions = size.num_parameters / 1e9
    if billions < 0.1:
        return f"{billions * 1000:.1f}M"
    return f"{billions:.1f}B"


def _refuse_options(ctx: click.Context) -> None:
    """Options of the list mean nothing to a sub-command."""
    for option in ctx.command.params:
        if ctx.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE:
            raise UsageError(
                f"{option.opts[0]} has no meaning before {ctx.invoked_subcommand!r}",
                "it is of the list alone: leave it out",
            )


@models.command()
@click.argument("name", shell_complete=completing(pair_names))
def show(name: str) -> None:
    """Say what pair NAME is: its models, its prompt, its settings."""
    pair = find_pair(name)
    lines = {"pair": pair.name, "for": pair.description}
    for weights in pair.draft:
        draft, target = pair.sources(weights)
        lines |= {f"draft ({weights})": draft, f"target ({weights})": target}
    if pair.reward is not None:
        lines["reward model"] = pair.reward
    lines |= {
        "context": f"{pair.context_limit} tokens",
        "system prompt": pair.system_prompt or "none",
        "thinking": "always" if pair.thinking else "with --thinking, if the models can",
        "candidates": f"{pair.num_candidates} a step",
        "verifier": _verifier(pair),
    }
    for label, text in lines.items():
        click.echo(f"{label:<15} {text}")


def _verifier(pair: ModelPair) -> str:
    profiles = (choose_profile(None, *pair.sources(weights)) for weights in pair.draft)
    profile = next(filter(None, profiles), None)
    if profile is not None:
        return f"profile {profile.name}, see: specguard profiles show {profile.name}"
    if pair.verifier.is_calibrated:
        return "fitted to this pair"
    return "not fitted to this pair, see: specguard calibrate"


@models.command()
@click.argument("names", nargs=-1, required=True, shell_complete=completing(pair_names))
@click.option(
    "--weights",
    type=click.Choice(["torch", "mlx"]),
    help="Which of a pair's weights [those of the backend that auto would choose].",
)
def pull(names: tuple[str, ...], weights: str | None) -> None:
    """Download pairs by NAMES, or models by hub id: the one command that uses the network."""
    sources: list[str] = []
    for name in names:
        if "/" in name:
            if weights is not None:
                raise UsageError("--weights chooses between a pair's weights", "leave it out")
            sources.append(name)
            continue
        pair = find_pair(name)
        if pair.name == BUILT_IN_PAIR:
            click.echo("the built-in pair is on this disk already", err=True)
            continue
        sources += pair.sources(weights or _default_weights())
    for source in dict.fromkeys(sources):
        _download(source)


@models.command()
@click.argument("name", shell_complete=completing(pair_names))
def use(name: str) -> None:
    """Remember pair NAME as the default."""
    find_pair(name)
    path = choose_pair(name)
    click.echo(f"{name} is the default pair from now on ({path})", err=True)


def _default_weights() -> str:
    from specguard.backends.registry import choose_backend

    _, backend, _ = choose_backend("auto")
    return backend.weights


def _remove_partial_files(snapshot: Path) -> None:
    """What killed downloads have left of a model that is whole now: nothing goes on from it.

    A file is locked while it is being downloaded. Those without a name are empty: the library looks
    at what permissions a new file has.
    """
    repo = snapshot.parents[1]
    locks = repo.parent / ".locks" / repo.name
    for file in (repo / "blobs").glob("*.incomplete"):
        with suppress(Timeout, OSError), FileLock(locks / f"{file.name.split('.')[0]}.lock", 0):
            file.unlink()
    for file in (repo / "blobs").glob("tmp_*"):
        file.unlink(missing_ok=True)


def _download(source: str) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    name, revision = split_revision(source)
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=_WANTED_FILES)
    except HFValidationError as error:
        raise UsageError(f"{source!r} is no hub id", "a hub id reads owner/name") from error
    except GatedRepoError as error:
        raise SpecguardError(
            f"{source} asks for consent to its licence",
            "accept it on the model's page, then log in with: hf auth login",
        ) from error
    except RepositoryNotFoundError as error:
        raise SpecguardError(f"the hub has no model {source}") from error
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SpecguardError(
            f"{source} could not be downloaded: {reason}",
            "check the network; started again, whole files are not downloaded again",
        ) from error
    _remove_partial_files(Path(folder))
    click.echo(f"{source}: {folder}", err=True)

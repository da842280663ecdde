"""``specguard models``: list pairs, download one, choose one."""

import click
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from specguard import SpecguardError, UsageError
from specguard.backends.checkpoint import split_revision
from specguard.cli.output import console
from specguard.models.pairs import BUILT_IN_PAIR, find_pair, pair_names
from specguard.models.settings import choose_pair, chosen_pair

# Weights as safetensors, and what config, tokenizer and template need; never pickles or code.
_WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


@click.group(invoke_without_command=True)
@click.pass_context
def models(ctx: click.Context) -> None:
    """List model pairs: what they are, what they need, whether they are on this disk."""
    if ctx.invoked_subcommand is not None:
        return
    chosen = chosen_pair()
    table = Table(box=None, pad_edge=False)
    for heading in ("pair", "weights", "on disk", "memory", "context", "draft", "target"):
        table.add_column(heading, overflow="fold")
    for name in pair_names():
        pair = find_pair(name)
        for row, weights in enumerate(pair.draft):
            draft, target = pair.sources(weights)
            is_built_in = name == BUILT_IN_PAIR
            mark = " *" if name == chosen else ""
            table.add_row(
                name + mark if row == 0 else "",
                weights,
                "yes" if pair.is_on_disk(weights) else "no",
                decimal(pair.memory_bytes[weights]),
                str(pair.context_limit),
                "built in" if is_built_in else escape(draft),
                "built in" if is_built_in else escape(target),
            )
    console().print(table)
    if chosen is not None:
        console(stderr=True).print("* your choice (specguard models use NAME)", style="dim")


@models.command()
@click.argument("name")
@click.option(
    "--weights",
    type=click.Choice(["torch", "mlx"]),
    help="Which of the pair's weights [those of the backend that auto would choose].",
)
def pull(name: str, weights: str | None) -> None:
    """Download pair NAME, or one model by its hub id: the one command that uses the network."""
    if "/" in name:
        if weights is not None:
            raise UsageError("--weights chooses between a pair's weights", "leave it out")
        sources: tuple[str, ...] = (name,)
    else:
        pair = find_pair(name)
        if name == BUILT_IN_PAIR:
            click.echo("the built-in pair is on this disk already", err=True)
            return
        sources = pair.sources(weights or _default_weights())
    for source in sources:
        _download(source)


@models.command()
@click.argument("name")
def use(name: str) -> None:
    """Remember pair NAME as the default."""
    find_pair(name)
    path = choose_pair(name)
    click.echo(f"{name} is the default pair from now on ({path})", err=True)


def _default_weights() -> str:
    from specguard.backends.registry import choose_backend

    _, backend, _ = choose_backend("auto")
    return backend.weights


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
            "check the network; started again, the download goes on where it stopped",
        ) from error
    click.echo(f"{source}: {folder}", err=True)

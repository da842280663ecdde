"""``specguard completion``: what makes a shell complete commands and options."""

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from specguard import UsageError

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_SPECGUARD_COMPLETE"


@click.command(
    epilog="""\b
    bash, in ~/.bashrc:
        eval "$(specguard completion bash)"
    zsh, in ~/.zshrc:
        eval "$(specguard completion zsh)"
    fish, in ~/.config/fish/config.fish:
        specguard completion fish | source"""
)
@click.argument("shell", type=click.Choice(SHELLS), required=False)
@click.pass_context
def completion(ctx: click.Context, shell: str | None) -> None:
    """Print the completion script of SHELL, by default of the one in use."""
    name = shell or Path(os.environ.get("SHELL", "")).name
    found = get_completion_class(name) if name in SHELLS else None
    if found is None:
        raise UsageError(f"no shell is called {name!r} here", f"name one: {', '.join(SHELLS)}")
    click.echo(found(ctx.find_root().command, {}, "specguard", VARIABLE).source())

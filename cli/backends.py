"""``specguard backends``: what can be used here, and why not."""

import click
from rich.markup import escape
from rich.table import Table

from specguard.backends.registry import automatic_backend, backend_names, find_backend
from specguard.cli.output import console

_GIB = 2**30


@click.command()
def backends() -> None:
    """List backends: which are usable here, and what the others lack."""
    chosen = automatic_backend()
    table = Table(box=None, pad_edge=False)
    for heading in ("backend", "usable", "device", "version", "memory", "why not"):
        table.add_column(heading, overflow="fold")
    for name in backend_names():
        status = find_backend(name).status()
        memory = f"{status.memory_bytes / _GIB:.0f} GiB" if status.memory_bytes else ""
        reason = ". ".join(part for part in (status.reason, status.hint) if part)
        table.add_row(
            name + (" *" if name == chosen else ""),
            "yes" if status.is_usable else "no",
            escape(status.device),
            escape(status.version),
            memory,
            escape(reason),
        )
    console().print(table)
    console(stderr=True).print("* what --backend auto takes", style="dim")

"""Markdown tables, and the line that says what figures were taken on."""

import platform
from collections.abc import Sequence
from datetime import date

from specguard.machine import hardware, installed_version

_PACKAGES = ("torch", "transformers", "mlx", "mlx-lm", "numpy")


def as_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def machine() -> dict[str, str]:
    """Date, processor, threads and library versions, for a report."""
    versions = {name: installed_version(name) or "not installed" for name in _PACKAGES}
    today = {"date": date.today().isoformat()}
    return {**today, **hardware(), "python": platform.python_version(), **versions}


def machine_line(found: dict[str, str]) -> str:
    """The machine in one line."""
    return ", ".join(f"{name} {value}" for name, value in found.items())

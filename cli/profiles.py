"""``specguard profiles``: list fitted verifiers, show one, remove one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from specguard import SpecguardError, UsageError
from specguard.cli.groups import Group
from specguard.cli.model_options import completing
from specguard.cli.output import console
from specguard.models.profiles import (
    Profile,
    find_profile,
    profile_names,
    profile_path,
    profiles_folder,
)


@click.group(cls=Group, invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of the table.")
@click.pass_context
def profiles(ctx: click.Context, as_json: bool) -> None:
    """List fitted verifiers: yours, and those that are shipped with the pairs."""
    if ctx.invoked_subcommand is not None:
        if as_json:
            raise UsageError("--json stands behind 'show'", "specguard profiles show NAME --json")
        return
    found = {name: _read(name) for name in profile_names()}
    if as_json:
        known = [profile.to_dict() for profile in found.values() if profile is not None]
        click.echo(json.dumps({"profiles": known}, indent=2, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("profile", "origin", "weighs", "threshold", "AUC", "fitted on"):
        table.add_column(heading, overflow="fold")
    for name, profile in found.items():
        if profile is None:
            table.add_row(escape(name), "cannot be read")
            continue
        auc = profile.figures.get("auc")
        table.add_row(
            escape(name),
            "yours" if profile.pair is None else "shipped",
            _weights(profile.verifier.weights),
            f"{profile.verifier.threshold:.2f}",
            "" if auc is None else f"{auc:.3f}",
            escape(profile.description),
        )
    err = console(stderr=True)
    if found:
        console().print(table)
    else:
        err.print("no profiles yet: specguard calibrate NAME fits one", style="dim")
    for path in _lone_labels(found):
        err.print(
            f"labels without a profile (the same calibration goes on from them): {path}",
            style="dim",
        )


@profiles.command()
@click.argument("name", shell_complete=completing(profile_names))
@click.option("--json", "as_json", is_flag=True, help="One JSON object, all of it.")
def show(name: str, as_json: bool) -> None:
    """Say what profile NAME weighs, and what its fit came to."""
    profile = find_profile(name)
    if as_json:
        click.echo(json.dumps(profile.to_dict(), indent=2, ensure_ascii=False))
        return
    verifier = profile.verifier
    lines = {
        "profile": name,
        "origin": f"yours, {profile_path(name)}"
        if profile.pair is None
        else f"shipped with the pair {profile.pair}",
        "fitted on": profile.description or "not said",
        "verified by": f"the {verifier.model}",
        "weighs": _weights(verifier.weights),
        "threshold": f"{verifier.threshold:.3f}",
    }
    for signal, (low, high) in verifier.bounds.items():
        lines[f"bounds of {signal}"] = f"{low:.4g} to {high:.4g}"
    for figure, value in profile.figures.items():
        lines[figure.replace("_", " ")] = f"{value:.4g}"
    for label, text in lines.items():
        click.echo(f"{label:<16} {text}")


@profiles.command()
@click.argument("name", shell_complete=completing(profile_names))
@click.option("--labels", is_flag=True, help="Its labelled steps too, which took the time.")
def remove(name: str, labels: bool) -> None:
    """Remove profile NAME of yours, and its plot."""
    path = profile_path(name)
    label_files = [path.with_suffix(".jsonl"), path.with_name(f".{name}.jsonl.lock")]
    files = [path, path.with_suffix(".png"), *(label_files if labels else [])]
    present = [file for file in files if file.is_file()]
    if not present:
        if name in profile_names():
            raise UsageError(
                f"profile {name!r} is shipped with its pair and stays",
                "leave it out of a run: --profile none",
            )
        find_profile(name)  # says that there is none
    for file in present:
        try:
            file.unlink()
        except OSError as error:
            raise SpecguardError(f"{file} cannot be removed: {error.strerror}") from error
        click.echo(f"removed {file}", err=True)
    if label_files[0].is_file():
        click.echo(f"kept {label_files[0]} (--labels removes it too)", err=True)
    if name in profile_names():
        click.echo(f"the profile {name!r} that is shipped is used again", err=True)


def _read(name: str) -> Profile | None:
    try:
        return find_profile(name)
    except SpecguardError:
        return None


def _weights(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items()) or "nothing"


def _lone_labels(profiles: Mapping[str, Any]) -> list[Path]:
    """Labels of calibrations that came to no profile."""
    return sorted(path for path in profiles_folder().glob("*.jsonl") if path.stem not in profiles)

"""``specguard calibrate``: fit a verifier to a pair on problems with known answers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress

from specguard.cli.data import data_options, read_data
from specguard.cli.model_options import ModelOptions, model_options
from specguard.cli.output import console, print_notes
from specguard.cli.values import CANDIDATES, SHARE
from specguard.core import SolveConfig, Solver, SpecguardError
from specguard.core.config import TARGET_SELECTOR, changed_settings
from specguard.files import cannot_write, check_output_file, write_atomically
from specguard.models.profiles import (
    NO_PROFILE,
    Profile,
    fingerprint,
    profile_path,
    save_profile,
)

LABELS_VERSION = 1  # grows where equal settings come to mean other labels


@click.command()
@click.argument("name")
@model_options
@data_options
@click.option(
    "--verifier",
    type=click.Choice(["draft", "target"]),
    show_default="the pair's",
    help="Who verifies.",
)
@click.option(
    "--k",
    "num_candidates",
    type=CANDIDATES,
    show_default="the pair's",
    help="Candidates per step.",
)
@click.option(
    "--fit",
    "kind",
    type=click.Choice(["beta", "logistic"]),
    default="beta",
    help="Weigh log-probability against another kind of it or grounding, or every signal.",
)
@click.option(
    "--accept-wrong",
    type=SHARE,
    default=0.05,
    help="Largest share of the wrong steps that may pass.",
)
def calibrate(
    name: str,
    models: ModelOptions,
    dataset: str | None,
    data: Path | None,
    fields: str | None,
    limit: int | None,
    verifier: str | None,
    num_candidates: int | None,
    kind: str,
    accept_wrong: float,
) -> None:
    """Fit a verifier to a pair and keep it as the profile NAME.

    A few dozen problems with known answers are enough. Steps of the draft after the target's own
    right steps are labelled by whether the target still reaches the answer; the labels are kept
    beside the profile, so that a run that was stopped goes on and another fit takes seconds.
    """
    labels_path = profile_path(name).with_suffix(".jsonl")
    if labels_path.parent.exists():  # else it is made
        for suffix in ".toml", ".jsonl", ".png":
            check_output_file(labels_path.with_suffix(suffix))
    items = read_data(dataset, data, fields, limit or (100 if data is None else None))
    try:
        from specguard.bench.grading import Grader
        from specguard.calibration.fit import fit, reliability_plot
        from specguard.calibration.labels import label_steps
        from specguard.journal import Journal
    except ImportError as error:
        raise SpecguardError(
            f"the package {error.name} is not installed", "pip install 'specguard[bench]'"
        ) from error
    err = console(stderr=True)
    # What is to be fitted anew is not what it begins with.
    solver = replace(models, profile=models.profile or NO_PROFILE).load(draft_cost=None)
    print_notes(solver, err)
    solver = _labelling(solver, verifier, num_candidates)
    assert solver.draft is not None
    assert solver.target is not None
    settings: dict[str, Any] = {
        "draft": fingerprint(solver.draft.name),
        "target": fingerprint(solver.target.name),
        "dataset": items.name,
        "config": {"version": LABELS_VERSION, "settings": _what_labels_depend_on(solver.config)},
    }
    with Journal(labels_path, settings) as journal, Grader() as grader:
        done = {row["id"] for row in journal.rows}
        with Progress(console=err, disable=not err.is_terminal) as progress:
            for item in progress.track(items.items, description="labelling steps"):
                if item.id not in done:
                    steps = label_steps(solver, item, grader)
                    journal.append({"id": item.id, "steps": steps})
        wanted = {item.id for item in items.items}
        rows = [
            {"problem": row["id"], **step}
            for row in journal.rows
            if row["id"] in wanted
            for step in row["steps"]
        ]
    try:
        fitted = fit(rows, solver.config.verifier, kind, accept_wrong)  # type: ignore[arg-type]
    except SpecguardError as error:
        kept = f"the labels so far are kept: {labels_path}" if rows else ""
        raise SpecguardError(error.message, "; ".join(filter(None, (error.hint, kept)))) from error
    figures: dict[str, Any] = {
        "steps": fitted.num_steps,
        "right": fitted.num_right,
        "auc": fitted.auc,
        "brier": fitted.brier,
        "right_accepted": fitted.right_accepted,
        "wrong_accepted": fitted.wrong_accepted,
    }
    profile = Profile(
        name, settings["draft"], settings["target"], fitted.verifier, figures, items.name
    )
    path = save_profile(profile)
    plot_path = path.with_suffix(".png")
    try:
        write_atomically(plot_path, reliability_plot(fitted))
    except OSError as error:
        raise cannot_write(plot_path, error) from error
    weights = ", ".join(f"{key} {value:.2f}" for key, value in fitted.verifier.weights.items())
    click.echo(f"{fitted.num_steps} steps, {fitted.num_right} of them right")
    click.echo(f"weights: {weights}; threshold {fitted.verifier.threshold:.3f}")
    click.echo(f"AUC {fitted.auc:.3f}, Brier score {fitted.brier:.3f} (cross-validated)")
    click.echo(
        f"accepts {fitted.right_accepted:.1%} of the right and {fitted.wrong_accepted:.1%} of the "
        "wrong steps"
    )
    click.echo(f"profile: {path}")
    click.echo(
        "used for these models from now on (--profile NAME: another; --profile none: without)"
    )


def _labelling(solver: Solver, verifier: Any, num_candidates: int | None) -> Solver:
    """The solver with the settings that steps are proposed and read with."""
    config = solver.config
    if verifier is not None:
        config = replace(config, selector=_embedder(config))
        config = replace(config, verifier=replace(config.verifier.asking(verifier), bounds={}))
    if num_candidates is not None:
        config = replace(config, num_candidates=num_candidates)
    return Solver(solver.draft, solver.target, config)


def _embedder(config: SolveConfig) -> str:
    """Steps are selected by their consistency: whether the target would is not known yet."""
    return "draft" if config.selector == TARGET_SELECTOR else config.selector


def _what_labels_depend_on(config: SolveConfig) -> dict[str, Any]:
    verifier = replace(config.verifier, bounds={}, threshold=0.7, weights={})
    return changed_settings(replace(config, selector=_embedder(config), verifier=verifier))

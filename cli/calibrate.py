"""``specguard calibrate``: fit a verifier to a pair on problems with known answers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress

from specguard import load
from specguard.cli.data import data_options, read_data
from specguard.cli.options import model_options
from specguard.cli.output import console
from specguard.core import Engine, SolveConfig, SpecguardError
from specguard.files import write_atomically
from specguard.models.profiles import Profile, fingerprint, profile_path, save_profile


@click.command()
@click.argument("name")
@model_options
@data_options
@click.option(
    "--verifier", type=click.Choice(["draft", "target"]), help="Who verifies [the pair's own]."
)
@click.option("--k", "num_candidates", type=click.IntRange(min=1), help="Candidates per step.")
@click.option(
    "--fit",
    "kind",
    type=click.Choice(["beta", "logistic"]),
    default="beta",
    show_default=True,
    help="Weigh log-probability against grounding, or every signal.",
)
@click.option(
    "--accept-wrong",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    help="Largest share of the wrong steps that may pass.",
)
def calibrate(
    name: str,
    pair: str | None,
    draft: str | None,
    target: str | None,
    backend: str,
    dtype: str,
    trust_remote_code: bool,
    profile: str | None,
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
    items = read_data(dataset, data, fields, limit or (100 if data is None else None))
    engine = load(
        pair,
        backend=backend,
        draft=draft,
        target=target,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        profile=profile,
    )
    engine = _labelling(engine, verifier, num_candidates)
    try:
        from specguard.bench.grading import Grader
        from specguard.bench.journal import Journal
        from specguard.calibration.fit import fit, reliability_plot
        from specguard.calibration.labels import label_steps
    except ImportError as error:
        raise SpecguardError(
            f"the package {error.name} is not installed", "pip install 'specguard[bench]'"
        ) from error
    assert engine.draft is not None
    assert engine.target is not None
    settings = {
        "draft": fingerprint(engine.draft.name),
        "target": fingerprint(engine.target.name),
        "dataset": items.name,
        "config": _what_labels_depend_on(engine.config),
    }
    err = console(stderr=True)
    with Journal(labels_path, settings) as journal, Grader() as grader:
        done = {row["id"] for row in journal.rows}
        with Progress(console=err, disable=not err.is_terminal) as progress:
            for item in progress.track(items.items, description="labelling steps"):
                if item.id not in done:
                    steps = list(label_steps(engine, item, grader))
                    journal.append({"id": item.id, "steps": steps})
        wanted = {item.id for item in items.items}
        rows = [
            {"problem": row["id"], **step}
            for row in journal.rows
            if row["id"] in wanted
            for step in row["steps"]
        ]
    found = fit(rows, engine.config.verifier, kind, accept_wrong)  # type: ignore[arg-type]
    figures: dict[str, Any] = {
        "steps": found.num_steps,
        "right": found.num_right,
        "auc": found.auc,
        "brier": found.brier,
        "right_accepted": found.right_accepted,
        "wrong_accepted": found.wrong_accepted,
    }
    made = Profile(name, settings["draft"], settings["target"], found.verifier, figures)
    path = save_profile(made)
    write_atomically(path.with_suffix(".png"), reliability_plot(found))
    weights = ", ".join(f"{key} {value:.2f}" for key, value in found.verifier.weights.items())
    click.echo(f"{found.num_steps} steps, {found.num_right} of them right")
    click.echo(f"weights: {weights}; threshold {found.verifier.threshold:.3f}")
    click.echo(f"AUC {found.auc:.3f}, Brier score {found.brier:.3f} (cross-validated)")
    click.echo(
        f"accepts {found.right_accepted:.1%} of the right and {found.wrong_accepted:.1%} of the "
        "wrong steps"
    )
    click.echo(f"profile: {path} (use it: --profile {name})")


def _labelling(engine: Engine, verifier: Any, num_candidates: int | None) -> Engine:
    """The engine with the settings that steps are proposed and read with."""
    config = engine.config
    if verifier is not None:
        config = replace(config, selector=config.embedder)
        config = replace(config, verifier=replace(config.verifier, model=verifier, bounds={}))
    if num_candidates is not None:
        config = replace(config, num_candidates=num_candidates)
    return Engine(engine.draft, engine.target, config)


def _what_labels_depend_on(config: SolveConfig) -> str:
    verifier = replace(config.verifier, bounds={}, threshold=0.7, weights={})
    return repr(replace(config, selector=config.embedder, verifier=verifier))

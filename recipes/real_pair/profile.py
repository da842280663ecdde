"""Fits a verifier to the signals of labelled steps, as ``specguard calibrate`` would to its own.

Of the greedy steps, which the pair's default proposes. Knows the files and the tokenizer, no
engine::

    python -m recipes.real_pair.profile --pair PAIR --output STEPS [--ship models/fitted]
"""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from recipes.real_pair.lines import Record, read_lines
from specguard.backends.tokenizer import FolderTokenizer
from specguard.calibration.fit import Fit, Kind, fit
from specguard.core import Observation, PieceTable, VerifierConfig
from specguard.core.verifier import verify
from specguard.files import write_atomically
from specguard.models.profiles import Profile, fingerprint

NAME = "qwen2.5-coder"
SHIPPED = "sum and numbers"
# What is fitted to: the kind of fit, and the signals; None: all of them.
WAYS: dict[str, tuple[Kind, tuple[str, ...] | None]] = {
    "one reduction": ("beta", None),
    SHIPPED: ("logistic", ("log_prob_sum", "log_prob_numbers")),
    "all signals": ("logistic", None),
}


def labelled(row: Record, pieces: PieceTable) -> dict[str, Any]:
    """A labelled step as `fit` wants it, its signals those that the verifier would compute."""
    target = row["target"]
    seen = Observation(
        np.array(target["lp"]), np.array(target["first"]), token_entropies=np.array(target["h"])
    )
    texts = [pieces(token_id) for token_id in row["token_ids"]]
    signals = dict(verify(seen, None, 1.0, texts, VerifierConfig()).signals)
    return {"problem": row["problem"], "is_right": row["right"], "signals": signals}


def fitted(name: str, steps: list[dict[str, Any]], share: float) -> Fit:
    """A verifier of one of the `WAYS`, which lets ``share`` of the wrong steps pass."""
    kind, names = WAYS[name]
    if names is not None:
        steps = [
            {**step, "signals": {name: step["signals"][name] for name in names}} for step in steps
        ]
    return fit(steps, VerifierConfig(), kind, share)


def line(name: str, share: float, found: Fit) -> str:
    """A row of the table."""
    weights = ", ".join(f"{key} {value:.2f}" for key, value in found.verifier.weights.items())
    if len(found.verifier.weights) == 1:
        low, high = found.verifier.bounds_of(next(iter(found.verifier.weights)))
        weights += f", from {low + found.verifier.threshold * (high - low):.2f}"
    cells = [
        f"{name}, {share:.0%} of the wrong ones",
        weights,
        f"{found.auc:.3f}",
        f"{found.brier:.3f}",
        f"{found.right_accepted:.1%}",
        f"{found.wrong_accepted:.1%}",
    ]
    return f"| {' | '.join(cells)} |"


@click.command()
@click.option("--pair", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--output", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--wrong", "share", default=0.05, show_default=True, help="Wrong steps that pass.")
@click.option(
    "--ship",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help=f"Folder for the fit to {SHIPPED}, as the pair's profile.",
)
def main(pair: Path, output: Path, share: float, ship: Path | None) -> None:
    """Print what each kind of fit comes to, cross-validated over problems."""
    pieces = PieceTable(FolderTokenizer(pair / "coder-1.5b"))
    rows = [row for row in read_lines(output / "signals.jsonl") if row["kind"] == "greedy"]
    steps = [labelled(row, pieces) for row in rows]
    num_right = sum(step["is_right"] for step in steps)
    num_problems = len({step["problem"] for step in steps})
    click.echo(f"{len(steps)} greedy steps of {num_problems} problems, {num_right} right\n")
    names = ("fit", "weights", "AUC", "Brier", "right ones that pass", "wrong ones")
    click.echo(f"| {' | '.join(names)} |\n" + "|---" * len(names) + "|")
    for name in WAYS:
        for wrong in (share, 0.1):
            click.echo(line(name, wrong, fitted(name, steps, wrong)))
    if ship is None:
        return
    found = fitted(SHIPPED, steps, share)
    weighed = {name: found.verifier.bounds_of(name) for name in found.verifier.weights}
    profile = Profile(
        NAME,
        fingerprint(str(pair / "coder-0.5b")),
        fingerprint(str(pair / "coder-1.5b")),
        VerifierConfig(
            weights=found.verifier.weights, bounds=weighed, threshold=found.verifier.threshold
        ),
        {
            "steps": found.num_steps,
            "right": found.num_right,
            "auc": found.auc,
            "brier": found.brier,
            "right_accepted": found.right_accepted,
            "wrong_accepted": found.wrong_accepted,
        },
        f"{found.num_steps} steps of {num_problems} training problems of GSM8K",
        NAME,
    )
    text = json.dumps(profile.to_dict(), indent=2) + "\n"
    write_atomically(ship / f"{NAME}.json", text.encode())


if __name__ == "__main__":
    main()

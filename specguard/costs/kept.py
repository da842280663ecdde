"""What drafting costs, kept in the user's cache folder: a file for each pair, machine and way.

A file holds nothing that cannot be measured again: one that cannot be read counts as none, and a
folder that cannot be written is no error. Each is replaced in one go, so any number of processes
may read and write it.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import platformdirs

from specguard.core.errors import UsageError
from specguard.core.fallback import DraftCost
from specguard.costs.probe import Measurement
from specguard.files import write_atomically

FOLDER_VARIABLE = "SPECGUARD_CACHE_DIR"

# What a figure holds for: both models, the machine, the versions, how steps are drafted and
# verified. Plain values, as they stand in the file.
Conditions = Mapping[str, Any]


def cost_path(conditions: Conditions) -> Path:
    """The file of these conditions; the variable SPECGUARD_CACHE_DIR names another folder."""
    folder = os.environ.get(FOLDER_VARIABLE) or platformdirs.user_cache_dir("specguard")
    names = [_stem(conditions[role]["name"]) for role in ("draft", "target")]
    text = json.dumps(conditions, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Path(folder) / "costs" / f"{names[0]}+{names[1]}-{digest}.json"


def read_cost(conditions: Conditions) -> DraftCost | None:
    """The figures that were kept for just these conditions, if there are any."""
    try:
        content = json.loads(cost_path(conditions).read_text(encoding="utf-8"))
        if content["conditions"] != conditions:
            return None
        return DraftCost(**{**content["cost"], "source": "measured"})
    except (OSError, ValueError, TypeError, LookupError, UsageError):
        return None


def keep_cost(conditions: Conditions, measurement: Measurement) -> str | None:
    """Keep figures in place of older ones; the reason where that cannot be done."""
    content = {
        "conditions": conditions,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "cost": asdict(measurement.cost),
        "seconds": measurement.seconds,
    }
    path = cost_path(conditions)
    try:
        write_atomically(path, json.dumps(content, indent=2).encode(), make_folders=True)
    except OSError as error:
        return f"{path} cannot be written: {error.strerror}"
    return None


def _stem(name: str) -> str:
    """The last part of a model's name, as a part of a file's."""
    return re.sub(r"[^\w.-]", "-", Path(name).name)[:60] or "model"

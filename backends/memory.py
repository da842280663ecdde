"""Whether models fit, found out before they are loaded: weights, keys and values, what is free."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from specguard.core.errors import SpecguardError

_GIB = 2**30
_CGROUPS, _OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class Place:
    """A memory that models are loaded into: its name, and the bytes that are free in it."""

    name: str
    num_free_bytes: int


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a model is known to need before it is on this disk.

    ``num_cached_numbers`` are the numbers that the keys and values of one token are.
    """

    num_parameters: int
    num_cached_numbers: int


@dataclass(frozen=True, slots=True)
class Demand:
    """What a model takes once loaded; ``num_bytes_per_token`` are of its keys and values."""

    model: str
    place: Place
    num_weight_bytes: int
    num_bytes_per_token: int


def this_machine() -> Place:
    """Main memory, or the part of it that this process may have."""
    return Place("this machine", min([psutil.virtual_memory().available, *_free_in_cgroups()]))


def check_memory(demands: Sequence[Demand], num_tokens: int) -> None:
    """Refuse models that do not fit together.

    Args:
        demands: of all models that are about to be loaded.
        num_tokens: whose keys and values each has to hold.

    Raises:
        SpecguardError: a place is too small for what is to lie in it.
    """
    for name in dict.fromkeys(demand.place.name for demand in demands):
        own = [demand for demand in demands if demand.place.name == name]
        free = min(demand.place.num_free_bytes for demand in own)
        weights = sum(demand.num_weight_bytes for demand in own)
        cache = num_tokens * sum(demand.num_bytes_per_token for demand in own)
        if weights + cache > free:
            models = " and ".join(demand.model for demand in own)
            needs = "need" if len(own) > 1 else "needs"
            raise SpecguardError(
                f"{models} {needs} {(weights + cache) / _GIB:.1f} GiB ({cache / _GIB:.1f} of it "
                f"for keys and values) and {name} has {free / _GIB:.1f} GiB free",
                "choose a smaller or quantised pair, --dtype bfloat16 or fewer --max-tokens, or "
                "close other programs",
            )


def _free_in_cgroups() -> list[int]:
    """What the control groups of this process leave, those that have a limit."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:  # not on Linux
        return []
    free = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            top, names = _CGROUPS, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, names = _CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # A container may see the path that its group has outside: then only the top is there.
        folder = top / path.lstrip("/")
        groups = [group for group in (folder, *folder.parents) if group.is_relative_to(top)]
        free += [_free_in(group, *names) for group in groups]
    return [num_bytes for num_bytes in free if num_bytes is not None]


def _free_in(group: Path, limit: str, usage: str) -> int | None:
    """What a group leaves, files that the kernel holds in memory for it not counted as used."""
    try:
        num_bytes = int((group / limit).read_text()) - int((group / usage).read_text())
        figures = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None
    for name in "active_file", "inactive_file":
        num_bytes += int(figures.get(f"total_{name}", figures.get(name, 0)))
    return max(0, num_bytes)

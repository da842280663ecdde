"""Which figure says what drafting costs: one that was kept, one measured now, or the models' sizes.

And whether it pays at all by it, which is said before the first step.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from specguard.backends.checkpoint import is_on_disk, open_model
from specguard.backends.registry import choose_backend
from specguard.core.config import TARGET_SELECTOR, Author, SolveConfig
from specguard.core.errors import SpecguardError
from specguard.core.fallback import TYPICAL_STEP, DraftCost
from specguard.core.loop import fallback_for
from specguard.core.pairing import Pair
from specguard.core.reference import is_reference
from specguard.core.runner import Runner
from specguard.costs.kept import Conditions, keep_cost, read_cost
from specguard.costs.probe import NUM_ROWS, measure
from specguard.costs.side import Clock
from specguard.machine import hardware, installed_version
from specguard.models.profiles import fingerprint

MEASURING = "measuring what drafting costs here"
# Whoever sets one of these says how steps are to be drafted, and wants to see them drafted.
_DRAFTING = {"num_candidates", "num_first_candidates", "sampling", "selector", "verifier"}


def settle_cost(
    pair: Pair,
    config: SolveConfig,
    conditions: Conditions,
    *,
    chosen: Collection[str] = (),
    anew: bool = False,
    progress: Callable[[str], None] | None = None,
    clock: Clock = time.perf_counter,
) -> tuple[SolveConfig, list[str]]:
    """Settings with what drafting costs on this machine, and what the user should know of it.

    Candidates that the target chooses among are there for accuracy: they are drafted whatever they
    cost, unless a measurement is asked for.

    Args:
        pair: the engines.
        config: settings; a plain method's are left as they are.
        conditions: what the figure holds for, see `conditions_for`.
        chosen: settings that somebody chose.
        anew: measure even where a figure was kept.
        progress: called with `MEASURING` before it is measured.
        clock: seconds, to measure by.
    """
    if len(config.authors) < 2 or (_is_for_accuracy(config) and not anew):
        return config, []
    if config.verifier.asks_target and pair.target and "scoring" not in pair.target.features:
        return config, []  # it is refused as soon as something is to be solved
    notes: list[str] = []
    cost = None if anew else read_cost(conditions)
    if cost is None:
        if progress is not None:
            progress(MEASURING)
        cost, notes = _measured(pair, config, conditions, clock)
    config = replace(config, draft_cost=cost)
    share = fallback_for(config).at_best
    if share < 1:
        return config, notes
    words = f"with every step accepted a token takes {share:.2f} times what the target alone takes"
    if config.method != "rsd" and not _DRAFTING & set(chosen):
        notes.append(
            f"drafting cannot pay here: {words}, so the target writes alone; --no-fallback drafts "
            "all the same"
        )
        return config, notes
    notes.append(f"drafting cannot pay here: {words}; --method target is faster")
    return replace(config, draft_cost=None), notes


def conditions_for(
    sources: Mapping[Author, str],
    backends: Mapping[Author, str],
    arguments: Mapping[str, Mapping[str, str]],
    dtypes: Mapping[Author, str],
    reward: str | None,
    config: SolveConfig,
) -> Conditions:
    """All that a figure depends on, as plain values."""
    verifier = config.verifier
    models: dict[str, Any] = {}
    for role, source in sources.items():
        name, backend, device = choose_backend(backends[role])
        status = backend.status()
        models[role] = {
            "name": source,
            "fingerprint": fingerprint(source) if is_on_disk(source) else None,
            "backend": device or name,
            "device": status.device,
            "version": status.version,
            "dtype": dtypes[role],
            "arguments": dict(arguments.get(role, {})),
        }
    return {
        **models,
        "reward": reward if config.method == "rsd" else None,
        "machine": hardware(),
        "specguard": installed_version("specguard"),
        "is_reference": is_reference(),
        "method": config.method,
        "candidates": max(NUM_ROWS, config.num_candidates),
        "is_greedy": config.step_sampling.is_greedy,
        "verifier": verifier.model if verifier.needs_model else None,
        "attention": verifier.num_layers if verifier.needs_attention else None,
        "read": config.num_candidates if config.selector == TARGET_SELECTOR else 1,
    }


def _is_for_accuracy(config: SolveConfig) -> bool:
    return config.selector == TARGET_SELECTOR and config.num_candidates > 1


def _measured(
    pair: Pair, config: SolveConfig, conditions: Conditions, clock: Clock
) -> tuple[DraftCost | None, list[str]]:
    try:
        with Runner() as runner:
            measurement = runner.run(measure(pair, config, clock))
    except SpecguardError as error:
        cost = _cost_by_size(conditions)
        instead = "it is guessed by the models' sizes" if cost else "every step is drafted"
        return cost, [f"what drafting costs could not be measured ({error.message}): {instead}"]
    cost = measurement.cost
    reason: str | None = "the machine is busy"
    if measurement.is_steady:
        reason = keep_cost(conditions, measurement)
    reading = cost.verification + cost.reading * TYPICAL_STEP
    words = (
        f"measured in {measurement.seconds['all']:.1f} s what drafting costs here, in the target's "
        f"tokens: {cost.candidate:.2f} a token, {reading:.1f} to verify a step"
    )
    return cost, [words if reason is None else f"{words}; measured anew next time, as {reason}"]


def _cost_by_size(conditions: Conditions) -> DraftCost | None:
    """A decode step takes as long as its weights take to read; None where these are not known."""
    names = [conditions[role]["name"] for role in ("draft", "target")]
    if not all(map(is_on_disk, names)):
        return None
    draft, target = map(open_model, names)
    return DraftCost(draft.num_bytes / target.num_bytes, source="sizes")

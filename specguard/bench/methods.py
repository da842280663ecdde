"""The methods that a benchmark compares, by name: settings of one engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from specguard.core.config import PRESETS, SolveConfig
from specguard.core.errors import UsageError
from specguard.core.model import GREEDY, Sampling

BASELINE = "target"
SAMPLED = Sampling()


@dataclass(frozen=True, slots=True)
class Method:
    """``changes`` to an engine's settings; more than one of ``num_votes`` solutions are voted on.

    The most frequent answer wins, ties go to the one that came first (self-consistency, Wang et
    al. 2023).
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    num_votes: int = 1

    def config(self, base: SolveConfig) -> SolveConfig:
        """The settings that it is run with."""
        return replace(base, **self.changes)

    def is_random(self, base: SolveConfig) -> bool:
        """Whether its solutions depend on the seed."""
        config = self.config(base)
        is_greedy = config.step_sampling.is_greedy
        if config.method == "specguard":
            is_greedy = is_greedy and config.rewrite_sampling.is_greedy
        return not is_greedy or self.num_votes > 1


def known_methods(base: SolveConfig) -> dict[str, Method]:
    """Every method by name; ``base`` are the pair's settings."""
    presets = {name: replace(base.verifier, **changes) for name, changes in PRESETS.items()}
    by_target = {"verifier": replace(base.verifier, model="target"), "selector": "target"}
    found = [
        Method("target", {"method": "target", "sampling": GREEDY}),
        Method("target-sampled", {"method": "target", "sampling": SAMPLED}),
        Method("draft", {"method": "draft", "sampling": GREEDY}),
        Method("draft-sampled", {"method": "draft", "sampling": SAMPLED}),
        Method("sd", {"method": "sd", "sampling": GREEDY}),
        Method("sd-sampled", {"method": "sd", "sampling": SAMPLED}),
        Method("majority-draft", {"method": "draft", "sampling": SAMPLED}, num_votes=8),
        Method("majority-target", {"method": "target", "sampling": SAMPLED}, num_votes=8),
        Method("specguard"),
        Method("specguard-greedy", {"num_candidates": 1, "sampling": GREEDY}),
        Method("specguard-target-selects", by_target),
        Method("specguard-draft-verifies", {"verifier": _by_draft(base), "selector": "draft"}),
        Method("specguard-combined", {"rewrite": "speculate"}),
        Method("paper", {"verifier": presets["paper"], "selector": "draft"}),
        Method("sc-only", {"verifier": presets["consistency-only"], "selector": "draft"}),
        Method("sc-log-prob", {"verifier": presets["log-prob"], "selector": "draft"}),
        Method("sc-grounding", {"verifier": presets["grounding"], "selector": "draft"}),
    ]
    return {method.name: method for method in found}


def _by_draft(base: SolveConfig) -> Any:
    return replace(base.verifier, model="draft")


def choose_methods(names: tuple[str, ...], base: SolveConfig) -> list[Method]:
    """Methods by name; ``NAME@K`` is one with K candidates a step, or K votes.

    Raises:
        UsageError: an unknown name, or a count of something that has none.
    """
    known, found = known_methods(base), []
    for name in dict.fromkeys(names):
        stem, _, count = name.partition("@")
        if stem not in known:
            raise UsageError(f"no method is called {stem!r}", f"methods: {', '.join(known)}")
        method = known[stem]
        if count:
            if not count.isdecimal() or int(count) < 1:
                raise UsageError(f"{name!r}: {count!r} is no number of candidates")
            if method.num_votes > 1:
                method = replace(method, name=name, num_votes=int(count))
            elif method.config(base).method == "specguard" and stem != "specguard-greedy":
                changes = {**method.changes, "num_candidates": int(count)}
                method = replace(method, name=name, changes=changes)
            else:
                raise UsageError(f"{stem} has no number of candidates")
        found.append(method)
    return found

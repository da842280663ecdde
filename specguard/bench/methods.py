"""The methods that a benchmark compares, by name: settings of one pair."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from specguard.core.config import PAPER_CANDIDATES, PRESETS, SolveConfig
from specguard.core.engine import GREEDY, Sampling
from specguard.core.errors import UsageError
from specguard.core.fallback import DraftCost

BASELINE = "target"
SAMPLED = Sampling()
AS_SOLVED = ("specguard", "sd", "sd-sampled")  # by what drafting costs here, as `solve` runs them


@dataclass(frozen=True, slots=True)
class Method:
    """``changes`` to a solver's settings; one of ``num_samples`` solutions is chosen.

    By ``choice`` "majority" the most frequent answer wins, ties go to the one that came first
    (self-consistency, Wang et al. 2023); by "reward" the solution whose steps a process reward
    model holds most probably right, all of them (the product, Lightman et al. 2023). ``matched``
    names a method: as many solutions are drawn as come nearest to its time on the problem, one at
    least.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    num_samples: int = 1
    choice: Literal["majority", "reward"] = "majority"
    matched: str | None = None

    @property
    def has_samples(self) -> bool:
        """Whether one of several solutions is chosen."""
        return self.num_samples > 1 or self.matched is not None

    @property
    def needs_reward(self) -> bool:
        """Whether it asks a process reward model."""
        ranks = self.has_samples and self.choice == "reward"
        return ranks or self.changes.get("method") == "rsd"

    def config(self, base: SolveConfig) -> SolveConfig:
        """The settings that it is run with."""
        return replace(base, **self.changes)

    def is_random(self, base: SolveConfig) -> bool:
        """Whether its solutions depend on the seed."""
        config = self.config(base)
        is_greedy = config.step_sampling.is_greedy
        if config.is_stepwise:
            is_greedy = is_greedy and config.rewrite_sampling.is_greedy
        return not is_greedy or self.has_samples


def known_methods(base: SolveConfig) -> dict[str, Method]:
    """Every method by name; ``base`` are the pair's settings.

    Those `AS_SOLVED` draft and guess as far as it pays. In the others every step is drafted and
    none of its tokens guessed, so that they compare what they are named after.
    """
    presets = {name: replace(base.verifier, **changes) for name, changes in PRESETS.items()}
    by_target: dict[str, Any] = {
        "verifier": base.verifier.asking("target"),
        "selector": "target",
    }
    by_draft: dict[str, Any] = {
        "verifier": base.verifier.asking("draft"),
        "selector": "draft",
    }
    target: dict[str, Any] = {"method": "target", "sampling": SAMPLED}
    draft: dict[str, Any] = {"method": "draft", "sampling": SAMPLED}
    greedy: dict[str, Any] = {"num_candidates": 1, "sampling": GREEDY}

    def cost_of(name: str) -> DraftCost | None:
        return base.draft_cost if name in AS_SOLVED else None

    found: list[Method] = [
        Method("target", {"method": "target", "sampling": GREEDY}),
        Method("target-sampled", target),
        Method("draft", {"method": "draft", "sampling": GREEDY}),
        Method("draft-sampled", draft),
        Method("sd", {"method": "sd", "sampling": GREEDY}),
        Method("sd-sampled", {"method": "sd", "sampling": SAMPLED}),
        Method("rsd", {"method": "rsd", "selector": "draft", **greedy}),
        Method("majority-draft", draft, num_samples=8),
        Method("majority-target", target, num_samples=8),
        Method("best-of-draft", draft, num_samples=8, choice="reward"),
        Method("best-of-target", target, num_samples=8, choice="reward"),
        Method("specguard"),
        Method("specguard-greedy", greedy),
        Method("specguard-always"),
        Method("specguard-adaptive", {"num_candidates": 16, "num_first_candidates": 4}),
        Method("specguard-target-selects", by_target),
        Method("specguard-draft-verifies", by_draft),
        Method("paper", {**PAPER_CANDIDATES, "verifier": presets["paper"]}),
        Method("sc-only", {**PAPER_CANDIDATES, "verifier": presets["consistency-only"]}),
        Method("sc-log-prob", {**PAPER_CANDIDATES, "verifier": presets["log-prob"]}),
        Method("sc-grounding", {**PAPER_CANDIDATES, "verifier": presets["grounding"]}),
    ]
    return {
        method.name: replace(method, changes={"draft_cost": cost_of(method.name), **method.changes})
        for method in found
    }


def choose_methods(names: tuple[str, ...], base: SolveConfig) -> list[Method]:
    """Methods by name; ``NAME@K`` is one with K candidates a step, or K solutions to choose from.

    ``NAME@=METHOD`` draws as many solutions as come nearest to the time of METHOD, which is to be
    named before it.

    Raises:
        UsageError: an unknown name, or a count of something that has none.
    """
    known = known_methods(base)
    found: list[Method] = []
    for name in dict.fromkeys(names):
        stem, mark, count = name.partition("@")
        if stem not in known:
            raise UsageError(f"no method is called {stem!r}", f"methods: {', '.join(known)}")
        method = known[stem]
        if mark:
            before = {method.name for method in found}
            method = replace(_counted(method, count, before, base), name=name)
        found.append(method)
    return found


def _counted(method: Method, count: str, before: set[str], base: SolveConfig) -> Method:
    if count.startswith("=") and method.has_samples:
        if count[1:] not in before:
            raise UsageError(
                f"{method.name}@{count}: {count[1:]!r} is no method named before it",
                "name it first: its time is what is matched",
            )
        return replace(method, num_samples=1, matched=count[1:])
    if not count.isdecimal() or int(count) < 1:
        raise UsageError(f"{method.name}@{count}: {count!r} is no number of candidates")
    if method.has_samples:
        return replace(method, num_samples=int(count))
    if not method.config(base).is_stepwise or method.name in ("specguard-greedy", "rsd"):
        raise UsageError(f"{method.name} has no number of candidates")
    changes = {**method.changes, "num_candidates": int(count)}
    if changes.get("num_first_candidates", 0) > int(count):
        raise UsageError(f"{method.name} draws 4 candidates first, {count} are fewer")
    return replace(method, changes=changes)

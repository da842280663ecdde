"""From names to a ready solver: which pair, which engines, which settings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from specguard.backends.checkpoint import is_on_disk, open_checkpoint
from specguard.backends.memory import check_memory
from specguard.backends.registry import Backend, MeasuredBackend, choose_backend
from specguard.core import DraftCost, Engine, RewardModel, SolveConfig, Solver, UsageError
from specguard.core.config import Author
from specguard.core.reference import is_reference
from specguard.models.pairs import BUILT_IN_PAIR, PAIRS, ModelPair, find_pair
from specguard.models.profiles import find_profile
from specguard.models.settings import chosen_pair

_PROMPT_TOKENS = 1024  # that room is left for, besides a solution


@dataclass(frozen=True, slots=True)
class Choice:
    """What will be loaded, decided before anything is; ``backends`` are by role."""

    pair: ModelPair | None
    draft: str | None
    target: str | None
    backends: dict[Author, str]
    is_fallback: bool = False

    @property
    def backend(self) -> str:
        """The target's, and the draft's where that is another one."""
        draft, target = self.backends["draft"], self.backends["target"]
        return target if draft == target else f"{target}, draft {draft}"


def load(
    pair: str | None = None,
    *,
    backend: str = "auto",
    draft_backend: str | None = None,
    draft: str | None = None,
    target: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    profile: str | None = None,
    reward: str | None = None,
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> Solver:
    """Load a pair and return a solver: ``specguard.load().solve("...")``.

    Args:
        pair: a pair's name; None takes the user's choice, else a preset on this disk, else the
            built-in pair.
        backend: ``auto``, ``mlx``, ``cuda``, ``cuda:N``, ``mps``, ``cpu``, or a third party's.
        draft_backend: of the draft alone, where it runs elsewhere than the target.
        draft: a folder or downloaded hub id in place of the pair's draft.
        target: the same for the target.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: run Python code that comes with a checkpoint.
        profile: a fitted verifier in place of the pair's, see ``specguard calibrate``.
        reward: a process reward model for method "rsd": a folder or downloaded hub id in place of
            the pair's.
        progress: called with each model's name before it is loaded.
        settings: fields of `SolveConfig`; the pair's own hold where nothing is given.

    Raises:
        UsageError: unknown names or impossible settings.
        SpecguardError: the backend or a model cannot be used, the models do not fit into the
            memory, or the profile is another pair's.
    """
    is_reference()  # refuses a value that is none before anything is loaded
    choice = choose(pair, backend, draft, target, draft_backend)
    config = configure(choice.pair, profile, **settings)
    if config.draft_cost is None and "draft_cost" not in settings:
        config = replace(config, draft_cost=_cost_by_size(choice))
    if len(config.authors) > 1 and (choice.draft is None or choice.target is None):
        raise UsageError("a draft and a target go together", "give both, or name a pair")
    sources = _sources(choice, config)
    if profile is not None:
        find_profile(profile).check(sources)
    models = [(source, choice.backends[role]) for role, source in sources.items()]
    needs_judge = reward is not None or config.method == "rsd"
    if needs_judge:
        models.append((_reward_source(choice.pair, reward), backend))
    num_drafted = config.num_candidates * config.max_step_tokens if config.is_stepwise else 0
    _check_memory(models, config.max_tokens + num_drafted, dtype)
    engines = _load_engines(choice, sources, dtype, trust_remote_code, progress)
    judge = None
    if needs_judge:
        judge = load_reward(choice.pair, reward, backend, dtype, trust_remote_code, progress)
    solver = Solver(engines.get("draft"), engines.get("target"), config, judge)
    if profile is None and not settings.keys() & {"verifier", "selector"}:
        solver.config, solver.notes = solver.pair.degraded(config)
    notes = (getattr(engine, "note", "") for engine in engines.values())
    solver.notes += dict.fromkeys(filter(None, notes))
    return solver


def load_reward(
    pair: ModelPair | None,
    reward: str | None = None,
    backend: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[str], None] | None = None,
) -> RewardModel:
    """Load the process reward model that was named, or else the pair's.

    Raises:
        UsageError: none is named and the pair has none.
        SpecguardError: it cannot be used, or does not fit into the memory.
    """
    source = _reward_source(pair, reward)
    _check_memory([(source, backend)], SolveConfig().max_tokens, dtype)
    if progress is not None:
        progress(source)
    from specguard.backends.reward import load_reward_model

    return load_reward_model(source, backend, dtype, trust_remote_code)


def choose(
    pair: str | None,
    backend: str,
    draft: str | None = None,
    target: str | None = None,
    draft_backend: str | None = None,
) -> Choice:
    """Decide the sources: given ones, the named pair, the user's, one on disk, the built-in.

    Raises:
        UsageError: unknown names.
        SpecguardError: a backend is not usable.
    """
    backends: dict[Author, str] = {"draft": draft_backend or backend, "target": backend}
    implementations: dict[Author, Backend] = {}
    for role, wanted in backends.items():
        name, implementations[role], device = choose_backend(wanted)
        backends[role] = device or name
    if pair is None and (draft is not None or target is not None):
        return Choice(None, draft, target, backends)
    weights = {role: implementation.weights for role, implementation in implementations.items()}
    if pair is not None:
        chosen, is_fallback = find_pair(pair), False
    else:
        chosen, is_fallback = _default_pair(weights["target"])
    pair_draft = chosen.sources(weights["draft"])[0]
    pair_target = chosen.sources(weights["target"])[1]
    if draft is not None or target is not None:
        # Bounds and costs are those of the two models; the rest of the pair's settings still holds.
        chosen = replace(chosen, verifier=replace(chosen.verifier, bounds={}), draft_cost=None)
    return Choice(chosen, draft or pair_draft, target or pair_target, backends, is_fallback)


def configure(pair: ModelPair | None, profile: str | None = None, **settings: Any) -> SolveConfig:
    """A pair's settings with those of a profile and other changes on top.

    Raises:
        UsageError: an unknown profile or setting, or an impossible value.
    """
    config = SolveConfig()
    if pair is not None:
        config = replace(
            config,
            num_candidates=pair.num_candidates,
            selector=pair.selector,
            verifier=pair.verifier,
            draft_cost=pair.draft_cost,
            system_prompt=pair.system_prompt,
        )
    if profile is not None:
        config = replace(config, verifier=find_profile(profile).verifier)
    return Solver(config=config).configured(**settings)


def _sources(choice: Choice, config: SolveConfig) -> dict[Author, str]:
    """The models that the method needs, by role."""
    named: dict[Author, str | None] = {"draft": choice.draft, "target": choice.target}
    return {
        role: source
        for role, source in named.items()
        if source is not None and role in config.authors
    }


def _load_engines(
    choice: Choice,
    sources: dict[Author, str],
    dtype: str,
    trust_remote_code: bool,
    progress: Callable[[str], None] | None,
) -> dict[Author, Engine]:
    engines: dict[Author, Engine] = {}
    for role, source in sources.items():
        if progress is not None:
            progress(source)
        _, backend, device = choose_backend(choice.backends[role])
        engines[role] = backend.load(source, dtype, trust_remote_code, device)
    return engines


def _reward_source(pair: ModelPair | None, reward: str | None) -> str:
    source = reward or (pair.reward if pair is not None else None)
    if source is None:
        raise UsageError("a process reward model is needed", "name one with --reward")
    return source


def _check_memory(models: Sequence[tuple[str, str]], num_tokens: int, dtype: str) -> None:
    """Refuse what does not fit before any of it is loaded; ``models`` are sources and backends."""
    demands = []
    for source, name in models:
        _, backend, device = choose_backend(name)
        if isinstance(backend, MeasuredBackend):
            demands.append(backend.demand(source, dtype, device))
    check_memory(demands, _PROMPT_TOKENS + num_tokens)


def _cost_by_size(choice: Choice) -> DraftCost | None:
    """A decode step takes as long as its weights take to read; None where these are not known."""
    sources = [source for source in (choice.draft, choice.target) if source is not None]
    if len(sources) < 2 or not all(map(is_on_disk, sources)):
        return None
    draft, target = map(open_checkpoint, sources)
    return DraftCost(draft.num_bytes / target.num_bytes)


def _default_pair(weights: str) -> tuple[ModelPair, bool]:
    name = chosen_pair()
    if name is not None:
        return find_pair(name), False
    for pair in PAIRS.values():
        if pair.name != BUILT_IN_PAIR and pair.is_on_disk(weights):
            return pair, False
    return PAIRS[BUILT_IN_PAIR], True

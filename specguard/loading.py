"""From names to a ready engine: which pair, which backend, which settings."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from specguard.backends.checkpoint import is_on_disk, open_checkpoint
from specguard.backends.registry import choose_backend
from specguard.core import (
    DraftCost,
    Engine,
    LanguageModel,
    RewardModel,
    SolveConfig,
    UsageError,
)
from specguard.core.shortcuts import check_switches
from specguard.models.pairs import BUILT_IN_PAIR, PAIRS, ModelPair, find_pair
from specguard.models.profiles import find_profile
from specguard.models.settings import chosen_pair


@dataclass(frozen=True, slots=True)
class Choice:
    """What will be loaded, decided before anything is."""

    pair: ModelPair | None
    draft: str | None
    target: str | None
    backend: str
    is_fallback: bool = False


def load(
    pair: str | None = None,
    *,
    backend: str = "auto",
    draft: str | None = None,
    target: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    profile: str | None = None,
    reward: str | None = None,
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> Engine:
    """Load a pair and return an engine: ``specguard.load().solve("...")``.

    Args:
        pair: a pair's name; None takes the user's choice, else a preset on this disk, else the
            built-in pair.
        backend: ``auto``, ``mlx``, ``cuda``, ``cuda:N``, ``mps``, ``cpu``, or a third party's.
        draft: a folder or downloaded hub id in place of the pair's draft.
        target: the same for the target.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: run Python code that comes with a checkpoint.
        reward: a process reward model for method "rsd": a folder or downloaded hub id in place of
            the pair's.
        profile: a fitted verifier in place of the pair's, see ``specguard calibrate``.
        progress: called with each model's name before it is loaded.
        settings: fields of `SolveConfig`; the pair's own hold where nothing is given.

    Raises:
        UsageError: unknown names or impossible settings.
        SpecguardError: the backend or a model cannot be used, or the profile is another pair's.
    """
    check_switches()
    choice = choose(pair, backend, draft, target)
    config = configure(choice.pair, profile, **settings)
    if config.draft_cost is None and "draft_cost" not in settings:
        config = replace(config, draft_cost=_cost_by_size(choice))
    if len(config.authors) > 1 and (choice.draft is None or choice.target is None):
        raise UsageError("a draft and a target go together", "give both, or name a pair")
    _, implementation, device = choose_backend(backend)
    models: list[LanguageModel[Any] | None] = []
    for role, source in ("draft", choice.draft), ("target", choice.target):
        if source is None or role not in config.authors:
            models.append(None)
            continue
        if progress is not None:
            progress(source)
        models.append(implementation.load(source, dtype, trust_remote_code, device))
    engine = Engine(models[0], models[1], config)
    if reward is not None or config.method == "rsd":
        engine.reward = load_reward(
            choice.pair, reward, backend, dtype, trust_remote_code, progress
        )
    if profile is not None:
        find_profile(profile).check(engine)
    return engine


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
        SpecguardError: it cannot be used.
    """
    source = reward or (pair.reward if pair is not None else None)
    if source is None:
        raise UsageError("a process reward model is needed", "name one with --reward")
    if progress is not None:
        progress(source)
    from specguard.backends.reward import load_reward_model

    return load_reward_model(source, backend, dtype, trust_remote_code)


def _cost_by_size(choice: Choice) -> DraftCost | None:
    """A decode step takes as long as its weights take to read; None where these are not known."""
    sources = [source for source in (choice.draft, choice.target) if source is not None]
    if len(sources) < 2 or not all(map(is_on_disk, sources)):
        return None
    draft, target = map(open_checkpoint, sources)
    return DraftCost(draft.num_bytes / target.num_bytes)


def choose(
    pair: str | None, backend: str, draft: str | None = None, target: str | None = None
) -> Choice:
    """Decide the sources: given ones, the named pair, the user's, one on disk, the built-in.

    Raises:
        UsageError: unknown names.
        SpecguardError: the backend is not usable.
    """
    name, implementation, _ = choose_backend(backend)
    weights = implementation.weights
    if pair is None and (draft is not None or target is not None):
        return Choice(None, draft, target, name)
    if pair is not None:
        found, is_fallback = find_pair(pair), False
    else:
        found, is_fallback = _default_pair(weights)
    pair_draft, pair_target = found.sources(weights)
    if draft is not None or target is not None:
        # Bounds and costs are those of the two models; the rest of the pair's settings still holds.
        found = replace(found, verifier=replace(found.verifier, bounds={}), draft_cost=None)
    return Choice(found, draft or pair_draft, target or pair_target, name, is_fallback)


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
    unknown = settings.keys() - set(SolveConfig.__dataclass_fields__)
    if unknown:
        raise UsageError(f"no setting is called {sorted(unknown)[0]!r}")
    return replace(config, **settings)


def _default_pair(weights: str) -> tuple[ModelPair, bool]:
    name = chosen_pair()
    if name is not None:
        return find_pair(name), False
    for found in PAIRS.values():
        if found.name != BUILT_IN_PAIR and found.is_on_disk(weights):
            return found, False
    return PAIRS[BUILT_IN_PAIR], True

"""From names to a ready engine: which pair, which backend, which settings."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from specguard.backends.registry import choose_backend
from specguard.core import Engine, LanguageModel, SolveConfig, UsageError
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
        profile: a fitted verifier in place of the pair's, see ``specguard calibrate``.
        progress: called with each model's name before it is loaded.
        settings: fields of `SolveConfig`; the pair's own hold where nothing is given.

    Raises:
        UsageError: unknown names or impossible settings.
        SpecguardError: the backend or a model cannot be used, or the profile is another pair's.
    """
    choice = choose(pair, backend, draft, target)
    config = configure(choice.pair, profile, **settings)
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
    if profile is not None:
        find_profile(profile).check(engine)
    return engine


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
        # Bounds are fitted to both models; the rest of the pair's settings still holds.
        found = replace(found, verifier=replace(found.verifier, bounds={}))
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

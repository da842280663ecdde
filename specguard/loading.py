"""From names to a ready solver: which pair, which engines, which settings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from specguard.backends.checkpoint import is_hub_id, is_on_disk, is_url, open_model
from specguard.backends.memory import check_memory
from specguard.backends.registry import (
    AUTO,
    Backend,
    MeasuredBackend,
    RoundingBackend,
    TunableBackend,
    arguments_by_role,
    backend_for,
    choose_backend,
)
from specguard.core import (
    Engine,
    RewardModel,
    SolveConfig,
    Solver,
    SpecguardError,
    UsageError,
    VerifierConfig,
)
from specguard.core.config import THINKING_SAMPLING, Author
from specguard.core.reference import is_reference
from specguard.costs.figure import conditions_for, settle_cost
from specguard.models.pairs import (
    BUILT_IN_PAIR,
    PAIRS,
    PROMPT_TOKENS,
    STEP_BY_STEP,
    ModelPair,
    find_pair,
    typical_tokens,
)
from specguard.models.profiles import Profile, choose_profile
from specguard.models.settings import chosen_pair


@dataclass(frozen=True, slots=True)
class Choice:
    """What will be loaded, decided before anything is; ``backends`` are by role.

    ``is_fallback`` marks the built-in pair where this call did not name it. ``profile`` is the
    fitted verifier that was named, or else one that is known for these models.
    """

    pair: ModelPair | None
    draft: str | None
    target: str | None
    backends: dict[Author, str]
    is_fallback: bool = False
    profile: Profile | None = None

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
    draft_dtype: str | None = None,
    engine_args: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
    profile: str | None = None,
    reward: str | None = None,
    progress: Callable[[str], None] | None = None,
    remeasure: bool = False,
    **settings: Any,
) -> Solver:
    """Load a pair and return a solver: ``specguard.load().solve("...")``.

    Args:
        pair: a pair's name; None takes the user's choice, else a preset on this disk, else the
            built-in pair.
        backend: ``auto``, ``mlx``, ``cuda``, ``cuda:N``, ``mps``, ``cpu``, ``vllm``,
            ``llamacpp``, or a third party's; ``auto`` is ``llamacpp`` for a GGUF file.
        draft_backend: of the draft alone, where it runs elsewhere than the target.
        draft: a folder, a GGUF file, a downloaded hub id, or a server's URL (servers alike: with
            commas between) in place of the pair's draft.
        target: the same for the target.
        dtype: ``auto``, ``float32``, ``bfloat16``, ``float16``, or ``int4``: rounded to 4 bits.
        draft_dtype: of the draft alone. None: the same; and where that is ``auto``, what suits a
            draft: its weights may be rounded, since the target judges what comes of it.
        engine_args: arguments of vLLM's or llama.cpp's engine, by name, and of an engine behind a
            URL (``model``, ``tokenizer``); ``draft.name`` and ``target.name`` are for one of the
            two.
        trust_remote_code: run Python code that comes with a checkpoint.
        profile: a fitted verifier, see ``specguard calibrate``; None takes one that fits these
            models, if there is one, and "none" leaves it out.
        reward: a process reward model for method "rsd": a folder or downloaded hub id in place of
            the pair's.
        progress: called with each model's name before it is loaded, and with words before what
            drafting costs is measured.
        remeasure: measure what drafting costs here, even where it is known.
        settings: fields of `SolveConfig`; the pair's own hold where nothing is given. ``verifier``
            may also be a mapping, of changes to the pair's own.

    Raises:
        UsageError: unknown names or impossible settings.
        SpecguardError: the backend or a model cannot be used, the models do not fit into the
            memory, or the profile is another pair's.
    """
    is_reference()  # refuses a value that is none before anything is loaded
    choice = choose(pair, backend, draft, target, draft_backend, profile)
    config = configure(choice, **settings)
    if len(config.authors) > 1 and (choice.draft is None or choice.target is None):
        raise UsageError("a draft and a target go together", "give both, or name a pair")
    sources = _sources(choice, config)
    _check_downloaded(choice, sources)
    arguments = arguments_by_role(
        engine_args or {}, {role: choice.backends[role] for role in sources}
    )
    if profile is not None and choice.profile is not None:
        choice.profile.check(sources)
    dtypes = dict.fromkeys(sources, dtype)
    if dtype != "auto" and all(map(is_url, sources.values())):
        raise UsageError("a server computes in the number type that it was started with")
    if "draft" in sources:
        dtypes["draft"] = draft_dtype or _draft_dtype(choice, sources["draft"], dtype)
    elif draft_dtype is not None:
        raise UsageError("there is no draft here whose number type could be chosen")
    dtypes |= {role: "auto" for role, source in sources.items() if is_url(source)}
    models = [
        (source, choice.backends[role], arguments[role], dtypes[role])
        for role, source in sources.items()
    ]
    needs_judge = reward is not None or config.method == "rsd"
    if needs_judge:
        models.append((_reward_source(choice.pair, reward), backend, {}, dtype))
    num_drafted = config.num_candidates * config.max_step_tokens if config.is_stepwise else 0
    num_written = config.max_tokens or typical_tokens(config.thinking)
    _check_memory(models, num_written + num_drafted)
    engines = _load_engines(choice, sources, arguments, dtypes, trust_remote_code, progress)
    judge = None
    if needs_judge:
        judge = load_reward(choice.pair, reward, backend, dtype, trust_remote_code, progress)
    solver = Solver(engines.get("draft"), engines.get("target"), config, judge)
    solver.config, solver.notes = solver.pair.degraded(config, _chosen(choice, profile, settings))
    notes = [getattr(engine, "note", "") for engine in engines.values()]
    if profile is None and choice.profile is not None and config.method == "specguard":
        notes.insert(0, choice.profile.note)
    if draft_dtype is None and dtypes.get("draft", dtype) != dtype:
        notes.append(
            f"the draft's weights are rounded ({dtypes['draft']}); --draft-dtype auto: they are not"
        )
    solver.notes += dict.fromkeys(filter(None, notes))
    if len(sources) == 2 and _are_one(*sources.values()):
        solver.notes.append("draft and target are the same model: there is nothing to gain")
    if len(sources) == 2 and "draft_cost" not in settings:
        reward = None if judge is None else judge.name
        solver.config, found = settle_cost(
            solver.pair,
            solver.config,
            conditions_for(sources, choice.backends, arguments, dtypes, reward, solver.config),
            chosen=settings,
            anew=remeasure,
            progress=progress,
        )
        solver.notes += found
    elif remeasure:
        raise UsageError("there is nothing to measure: drafting is given a cost, or no part")
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
    _check_memory([(source, backend, {}, dtype)], typical_tokens())
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
    profile: str | None = None,
) -> Choice:
    """Decide the sources: given ones, the named pair, the user's, one on disk, the built-in.

    Raises:
        UsageError: unknown names.
        SpecguardError: a backend is not usable, or the profile cannot be read.
    """
    backends: dict[Author, str] = {
        "draft": backend_for(draft, draft_backend or backend),
        "target": backend_for(target, backend),
    }
    implementations: dict[Author, Backend] = {}
    for role, wanted in backends.items():
        name, implementations[role], device = choose_backend(wanted)
        backends[role] = device or name
    if pair is None and (draft is not None or target is not None):
        fitted = choose_profile(profile, draft, target)
        return Choice(None, draft, target, backends, profile=fitted)
    weights = {role: implementation.weights for role, implementation in implementations.items()}
    if pair is not None:
        chosen, is_fallback = find_pair(pair), False
    else:
        chosen, is_fallback = _default_pair(weights["target"])
    is_changed = draft is not None or target is not None
    draft = draft or chosen.sources(weights["draft"])[0]
    target = target or chosen.sources(weights["target"])[1]
    if is_changed:
        # Bounds are those of the two models, and what they can solve; the rest still holds.
        chosen = replace(chosen, verifier=replace(chosen.verifier, bounds={}), check=None)
    fitted = choose_profile(profile, draft, target)
    return Choice(chosen, draft, target, backends, is_fallback, fitted)


def configure(choice: Choice, **settings: Any) -> SolveConfig:
    """A pair's settings with those of its profile and other changes on top.

    Raises:
        UsageError: an unknown setting, an impossible value, or a system prompt for the built-in
            pair.
    """
    config, pair = SolveConfig(system_prompt=STEP_BY_STEP), choice.pair
    if pair is not None:
        config = replace(
            config,
            num_candidates=pair.num_candidates,
            selector=pair.selector,
            verifier=pair.verifier,
            system_prompt=pair.system_prompt,
            thinking=pair.thinking,
        )
        if pair.name == BUILT_IN_PAIR and settings.get("system_prompt"):
            raise UsageError(
                "the built-in pair has no use for a system prompt: it has never seen one",
                "leave it out, or choose another pair: specguard models",
            )
    if choice.profile is not None:
        config = replace(config, verifier=choice.profile.verifier)
    if settings.get("thinking", config.thinking):
        config = replace(config, sampling=THINKING_SAMPLING, rewrite_sampling=THINKING_SAMPLING)
    if isinstance(settings.get("verifier"), Mapping):
        settings["verifier"] = changed_verifier(config.verifier, settings["verifier"])
    return Solver(config=config).configured(**settings)


def changed_verifier(verifier: VerifierConfig, changes: Mapping[str, Any]) -> VerifierConfig:
    """A verifier with changes; what they make impossible of it is dropped.

    Raises:
        UsageError: an unknown setting, or a value that `VerifierConfig` refuses.
    """
    unknown = changes.keys() - set(VerifierConfig.__dataclass_fields__)
    if unknown:
        raise UsageError(f"no setting of a verifier is called {min(unknown)!r}")
    return replace(verifier.asking(changes.get("model", verifier.model)), **changes)


def _chosen(choice: Choice, profile: str | None, settings: Mapping[str, Any]) -> set[str]:
    """The settings that somebody chose, the parts of a verifier among them."""
    verifier = settings.get("verifier", {})
    parts = set(verifier) if isinstance(verifier, Mapping) else {"weights"}
    if profile is not None and choice.profile is not None:
        parts.add("weights")
    return settings.keys() | parts


def _sources(choice: Choice, config: SolveConfig) -> dict[Author, str]:
    """The models that the method needs, by role."""
    named: dict[Author, str | None] = {"draft": choice.draft, "target": choice.target}
    return {
        role: source
        for role, source in named.items()
        if source is not None and role in config.authors
    }


def _are_one(draft: str, target: str) -> bool:
    """Whether two sources lead to the same model."""
    if not (is_on_disk(draft) and is_on_disk(target)):
        return draft == target
    files = ([path.resolve() for path in open_model(each).weight_files] for each in (draft, target))
    return next(files) == next(files)


def _check_downloaded(choice: Choice, sources: dict[Author, str]) -> None:
    """Name everything that is still to be downloaded, not the half that is missed first."""
    missing = [
        source for source in sources.values() if is_hub_id(source) and not is_on_disk(source)
    ]
    if not missing:
        return
    pair, wanted = choice.pair, " ".join(dict.fromkeys(missing))
    _, backend, _ = choose_backend(AUTO)
    # What pulling the pair's name brings here.
    usual = pair.sources(backend.weights) if pair and backend.weights in pair.draft else None
    if pair is not None and (choice.draft, choice.target) == usual:
        wanted = pair.name
    raise SpecguardError(
        f"not on this disk: {' and '.join(dict.fromkeys(missing))}",
        f"download first: specguard models pull {wanted}",
    )


def _load_engines(
    choice: Choice,
    sources: dict[Author, str],
    arguments: Mapping[str, Mapping[str, str]],
    dtypes: Mapping[Author, str],
    trust_remote_code: bool,
    progress: Callable[[str], None] | None,
) -> dict[Author, Engine]:
    engines: dict[Author, Engine] = {}
    for role, source in sources.items():
        if progress is not None:
            progress(source)
        _, backend, device = choose_backend(choice.backends[role])
        if isinstance(backend, TunableBackend):
            backend = backend.with_arguments(arguments[role])
        engines[role] = backend.load(source, dtypes[role], trust_remote_code, device)
    return engines


def _draft_dtype(choice: Choice, source: str, dtype: str) -> str:
    """What a draft is loaded as where nobody says so."""
    _, backend, _ = choose_backend(choice.backends["draft"])
    if dtype == "auto" and isinstance(backend, RoundingBackend):
        return backend.draft_dtype(source)
    return dtype


def _reward_source(pair: ModelPair | None, reward: str | None) -> str:
    source = reward or (pair.reward if pair is not None else None)
    if source is None:
        raise UsageError("a process reward model is needed", "name one with --reward")
    return source


def _check_memory(
    models: Sequence[tuple[str, str, Mapping[str, str], str]], num_tokens: int
) -> None:
    """Refuse what does not fit before any of it is loaded.

    ``models`` are sources, backends, the arguments of their engines, and number types.
    """
    demands = []
    for source, name, arguments, dtype in models:
        _, backend, device = choose_backend(name)
        if arguments and isinstance(backend, TunableBackend):
            backend = backend.with_arguments(arguments)
        if isinstance(backend, MeasuredBackend):
            demands.append(backend.demand(source, dtype, device))
    check_memory(demands, PROMPT_TOKENS + num_tokens)


def _default_pair(weights: str) -> tuple[ModelPair, bool]:
    name = chosen_pair()
    if name is not None:
        return find_pair(name), name == BUILT_IN_PAIR
    for pair in PAIRS.values():
        if pair.name != BUILT_IN_PAIR and pair.is_on_disk(weights):
            return pair, False
    return PAIRS[BUILT_IN_PAIR], True

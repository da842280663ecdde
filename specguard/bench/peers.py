"""This project's methods beside other libraries' decoding, on the same weights and prompts.

Each contender writes a solution to each problem before the next problem begins. Peers that are not
installed are left out and named.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from statistics import median
from typing import Any

from specguard.bench.replay import Replayed, Schedule, plain_words
from specguard.bench.tables import as_table
from specguard.core import GREEDY, Engine, LanguageModel, Sampling, SolveConfig, VerifierConfig
from specguard.core.errors import UsageError
from specguard.loading import load

TRANSFORMERS, MLX_LM = "transformers", "mlx-lm"
_MODULES = {TRANSFORMERS: ("torch", "transformers"), MLX_LM: ("mlx", "mlx_lm")}
# Temperature and top-p that leave every token possible, as replayed speculation needs it.
_OPEN = Sampling(1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Written:
    """What a contender wrote, and in how many tokens, a closing EOS included."""

    text: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that writes a solution to a problem.

    ``peer`` is the library that it is compared with. ``is_baseline`` marks that library's plain
    decoding; ``is_lossless`` what must write the same text as plain greedy decoding.
    """

    library: str
    method: str
    peer: str
    write: Callable[[str], Written]
    acceptance: float | None = None
    is_baseline: bool = False
    is_lossless: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A contender's medians over problems: seconds a token with the prompt's reading.

    ``ratio`` is its time a token over that of its peer's plain decoding, ``num_equal`` how many
    texts equal those of the first lossless contender; None where that means nothing.
    """

    library: str
    method: str
    acceptance: float | None
    token_seconds: float
    num_tokens: float
    ratio: float | None
    num_equal: int | None
    num_problems: int


@dataclass(slots=True)
class Race:
    """Contenders on the same problems, timed in turn."""

    contenders: Sequence[Contender]
    _seconds: list[list[float]] = field(default_factory=list)
    _written: list[list[Written]] = field(default_factory=list)

    def add(self, problem: str, is_warm_up: bool = False) -> None:
        """Let each contender solve one problem; a warm-up counts for nothing."""
        seconds, written = [], []
        for contender in self.contenders:
            started = time.perf_counter()
            written.append(contender.write(problem))
            seconds.append((time.perf_counter() - started) / written[-1].num_tokens)
        if not is_warm_up:
            self._seconds.append(seconds)
            self._written.append(written)

    def lines(self) -> list[Line]:
        """A line for each contender."""
        baselines = {
            one.peer: index for index, one in enumerate(self.contenders) if one.is_baseline
        }
        lossless = [index for index, one in enumerate(self.contenders) if one.is_lossless]
        found = []
        for index, one in enumerate(self.contenders):
            base = baselines.get(one.peer)
            num_equal = None
            if one.is_lossless:
                num_equal = sum(row[index].text == row[lossless[0]].text for row in self._written)
            found.append(
                Line(
                    library=one.library,
                    method=one.method,
                    acceptance=one.acceptance,
                    token_seconds=median(row[index] for row in self._seconds),
                    num_tokens=median(row[index].num_tokens for row in self._written),
                    ratio=None
                    if base is None
                    else median(row[index] / row[base] for row in self._seconds),
                    num_equal=num_equal,
                    num_problems=len(self._seconds),
                )
            )
        return found


@dataclass(frozen=True, slots=True)
class Sources:
    """Folders of a draft and a target, and how their prompts read."""

    draft: str
    target: str
    system_prompt: str | None = None


def missing_peers() -> list[str]:
    """Peers that are not installed here."""
    return [
        name
        for name, modules in _MODULES.items()
        if any(find_spec(module) is None for module in modules)
    ]


def built_in_race(sources: Sources, config: SolveConfig, backends: Iterable[str]) -> Race:
    """Greedy decoding to the end of the solution, by peers and by this project.

    ``config`` are the pair's settings, with which ``specguard`` runs.
    """
    contenders: list[Contender] = []
    for backend in backends:
        peer = _peer_of(backend)
        engine = Engine(*load_pair(sources, backend), config)
        limit = config.max_tokens
        if peer not in missing_peers():
            contenders += peer_contenders(peer, engine, sources, backend, limit, True)
        for method in "target", "sd", "specguard":
            changes: dict[str, Any] = {"method": method}
            if method != "specguard":
                changes["sampling"] = GREEDY
            count = engine.config.num_candidates
            contenders.append(
                Contender(
                    f"specguard ({backend})",
                    f"specguard, k = {count}" if method == "specguard" else method,
                    peer,
                    _solving(engine, changes),
                    is_lossless=method != "specguard",
                )
            )
    return Race(contenders)


def replayed_race(
    sources: Sources,
    backends: Iterable[str],
    num_tokens: int,
    counts: Sequence[int],
    acceptances: Sequence[float],
    step_length: int = 32,
) -> Race:
    """Solutions of ``num_tokens`` with replayed steps and decisions, beside peers' plain decoding.

    A step is ``step_length`` tokens long in the mean. With one candidate the target reads it, with
    several it scores all in one pass, by log-probability.
    """
    contenders: list[Contender] = []
    num_steps = max(1, round(num_tokens / step_length))
    for backend in backends:
        peer = _peer_of(backend)
        draft, target = load_pair(sources, backend)
        plain = Engine(draft, target, SolveConfig(system_prompt=sources.system_prompt))
        words = plain_words(target)
        schedules = {share: Schedule.of(num_steps, step_length, share) for share in acceptances}
        limit = next(iter(schedules.values())).num_tokens
        if peer not in missing_peers():
            contenders += peer_contenders(peer, plain, sources, backend, limit, False)[:1]
        config = replay_config(limit, sources.system_prompt)
        greedy = {"method": "target", "sampling": GREEDY}
        first = schedules[acceptances[0]]  # of the lengths alone: the target decides nothing
        cases: list[tuple[str, Mapping[str, Any], Schedule, float | None]] = [
            ("target", greedy, first, None)
        ]
        for share, schedule in schedules.items():
            cases.append(("sd", {"method": "sd", "sampling": _OPEN}, schedule, share))
            for count in counts:
                name = f"specguard, k = {count}"
                cases.append((name, {"num_candidates": count}, schedule, share))
        for method, changes, schedule, acceptance in cases:
            engine = Engine(
                Replayed(draft, "draft", schedule, words),
                Replayed(target, "target", schedule, words),
                config,
            )
            write = _solving(engine, changes)
            contenders.append(Contender(f"specguard ({backend})", method, peer, write, acceptance))
    return Race(contenders)


def replay_config(num_tokens: int, system_prompt: str | None = None) -> SolveConfig:
    """Settings under which a replayed outcome decides: the target's log-probability alone."""
    return SolveConfig(
        selector="target",
        verifier=VerifierConfig(model="target", weights={"log_prob": 1.0}),
        max_tokens=num_tokens,
        max_step_tokens=num_tokens,
        max_steps=num_tokens,
        system_prompt=system_prompt,
    )


def load_pair(sources: Sources, backend: str) -> tuple[LanguageModel[Any], LanguageModel[Any]]:
    """Both models in single precision."""
    engine = load(draft=sources.draft, target=sources.target, backend=backend, dtype="float32")
    assert engine.draft is not None
    assert engine.target is not None
    return engine.draft, engine.target


def peer_contenders(
    peer: str, engine: Engine, sources: Sources, backend: str, limit: int, stops: bool
) -> list[Contender]:
    """A library's plain decoding, and its speculation with the same draft.

    ``stops``: at EOS; else exactly ``limit`` tokens are written.
    """
    assert engine.target is not None
    tokenizer, system_prompt = engine.target.tokenizer, engine.config.system_prompt

    def prompt_of(problem: str) -> list[int]:
        return list(tokenizer.encode_prompt(problem, system_prompt, False).token_ids)

    if peer == TRANSFORMERS:
        plain, assisted = _transformers(sources, engine, backend, limit, stops)
    else:
        plain, assisted = _mlx_lm(sources, engine, limit, stops)
    return [
        Contender(
            peer,
            "generate",
            peer,
            lambda problem: plain(prompt_of(problem)),
            is_baseline=True,
            is_lossless=stops,
        ),
        Contender(
            peer,
            "assisted generation" if peer == TRANSFORMERS else "draft_model",
            peer,
            lambda problem: assisted(prompt_of(problem)),
            is_lossless=stops,
        ),
    ]


Generate = Callable[[list[int]], Written]


def _transformers(
    sources: Sources, engine: Engine, backend: str, limit: int, stops: bool
) -> tuple[Generate, Generate]:
    import torch
    from transformers import AutoModelForCausalLM

    from specguard.backends.pytorch.loading import quiet

    assert engine.target is not None
    tokenizer = engine.target.tokenizer
    with quiet():
        draft, target = (
            AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(backend).eval()
            for source in (sources.draft, sources.target)
        )
    for model in draft, target:
        model.generation_config.eos_token_id = sorted(tokenizer.eos_ids) if stops else None

    def generate(token_ids: list[int], **options: Any) -> Written:
        inputs = torch.tensor([token_ids], device=target.device)
        with quiet():  # assisted generation warns of what it hands to itself
            output = target.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=limit,
                do_sample=False,
                **options,
            )
        written = output[0, inputs.shape[1] :].tolist()
        return Written(tokenizer.decode(written), len(written))

    return generate, lambda token_ids: generate(token_ids, assistant_model=draft)


def _mlx_lm(sources: Sources, engine: Engine, limit: int, stops: bool) -> tuple[Generate, Generate]:
    import mlx.core as mx
    import mlx_lm

    assert engine.target is not None
    draft, _ = mlx_lm.load(sources.draft)
    target, tokenizer = mlx_lm.load(sources.target)
    for model in draft, target:
        model.set_dtype(mx.float32)
    tokenizer.eos_token_ids = set(engine.target.tokenizer.eos_ids) if stops else set()

    def generate(token_ids: list[int], **options: Any) -> Written:
        parts = list(
            mlx_lm.stream_generate(target, tokenizer, token_ids, max_tokens=limit, **options)
        )
        return Written("".join(part.text for part in parts), parts[-1].generation_tokens)

    return generate, lambda token_ids: generate(token_ids, draft_model=draft)


def _solving(engine: Engine, changes: Mapping[str, Any]) -> Callable[[str], Written]:
    def write(problem: str) -> Written:
        solution = engine.solve(problem, **changes)
        return Written(solution.text, solution.stats.num_tokens)

    return write


def _peer_of(backend: str) -> str:
    base = backend.partition(":")[0]
    if base == "mlx":
        return MLX_LM
    if base in ("cpu", "cuda", "mps"):
        return TRANSFORMERS
    raise UsageError(f"no peer runs what backend {backend!r} runs", "backends: cpu, cuda, mps, mlx")


def lines_table(lines: Sequence[Line], missing: Sequence[str]) -> str:
    """The contenders; a peer that is missing has a row that says so."""
    columns = (
        "library",
        "method",
        "replayed acceptance",
        "tokens",
        "ms / token",
        "time, peer's generate = 1",
        "equal texts",
    )
    rows = [
        (
            line.library,
            line.method,
            "" if line.acceptance is None else f"{line.acceptance:.0%}",
            f"{line.num_tokens:.0f}",
            f"{line.token_seconds * 1e3:.3f}",
            "" if line.ratio is None else f"{line.ratio:.2f}",
            "" if line.num_equal is None else f"{line.num_equal} of {line.num_problems}",
        )
        for line in lines
    ]
    rows += [(name, "not installed", "", "", "", "", "") for name in missing]
    return as_table(columns, rows)

"""From a solution to HTML: numbers become widths and shades here, the template places them.

The page needs no network and no script; everything that comes from models or users is escaped.
"""

from dataclasses import dataclass
from importlib.resources import files

import jinja2

from specguard.core.config import REWARD, SIGNALS, SolveConfig, VerifierConfig
from specguard.core.records import CandidateRecord, Solution, StepRecord, TokenArrays
from specguard.wording import (
    acceptance,
    decisive,
    drafted,
    is_telling,
    label,
    no_answer,
    spoken,
    verdict,
)

_COLDEST_LOGPROB = -4.0  # nats; a token that the model gives 2% or less is as hot as it gets


@dataclass(frozen=True, slots=True)
class Bar:
    """A signal of a step: its raw value, its score in [0, 1], and its weight in the ensemble.

    The ensemble's own has no raw value.
    """

    name: str
    value: float | None
    score: float
    weight: float


@dataclass(frozen=True, slots=True)
class Token:
    """A token's text, how doubtful it is in [0, 1], and what to say about it."""

    text: str
    heat: float
    title: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A candidate beside its lowest token log-probability; None where it was not kept."""

    record: CandidateRecord
    is_selected: bool
    min_logprob: float


@dataclass(frozen=True, slots=True)
class Step:
    """What the page shows of a step; ``decisive`` is what was compared with the threshold."""

    record: StepRecord
    label: str
    verdict: str
    text: str
    draft_text: str | None
    decisive: Bar | None
    bars: tuple[Bar, ...]
    candidates: tuple[Candidate, ...]
    heats: tuple[tuple[str, tuple[Token, ...]], ...]


@dataclass(frozen=True, slots=True)
class Span:
    """A phase's share of the time, in seconds and in [0, 1]."""

    name: str
    seconds: float
    share: float


def render(solution: Solution) -> str:
    """The page of a solution; candidates and tokens are shown where its steps kept them."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    here = files("specguard.trace")
    template = environment.from_string(here.joinpath("page.html.jinja").read_text("utf-8"))
    verifier = solution.config.verifier
    return template.render(
        solution=solution,
        verifier=verifier,
        style=here.joinpath("style.css").read_text("utf-8"),
        steps=[_step(step, solution.config) for step in solution.steps],
        ending=_ending(solution),
        acceptance=acceptance(solution),
        phases=_phases(solution),
        has_detail=any(step.tokens is not None for step in solution.steps),
    )


def _ending(solution: Solution) -> str:
    if solution.answer is None:
        return no_answer(solution)[0]
    marked = "last text, no box; " if solution.answer_source == "text" else ""
    return f"{marked}finished by {solution.finish_reason}"


def _step(record: StepRecord, config: SolveConfig) -> Step:
    bars = [
        Bar(
            spoken(name),
            record.signals[name],
            record.scores[name],
            1.0 if name == REWARD else config.verifier.weights.get(name, 0.0),
        )
        for name in (REWARD, *SIGNALS)
        if name in record.signals and is_telling(name, config)
    ]
    name, first = decisive(config), None
    if record.threshold is not None and name is not None:
        ensemble = Bar(name, None, record.scores["ensemble"], 1.0)
        first = next((bar for bar in bars if bar.name == name), ensemble)
    return Step(
        record,
        label(record),
        verdict(record, config),
        record.text.strip(),
        drafted(record),
        first,
        tuple(bar for bar in bars if bar is not first),
        tuple(
            Candidate(
                candidate, index == record.selected, min(candidate.token_logprobs, default=0.0)
            )
            for index, candidate in enumerate(record.candidates or ())
        ),
        _heats(record.tokens, config.verifier) if record.tokens is not None else (),
    )


def _heats(
    tokens: TokenArrays, verifier: VerifierConfig
) -> tuple[tuple[str, tuple[Token, ...]], ...]:
    by_logprob = tuple(
        Token(piece, _clamp(logprob / _COLDEST_LOGPROB), f"log-prob {logprob:.3f}")
        for piece, logprob in zip(tokens.pieces, tokens.logprobs, strict=True)
    )
    if tokens.grounding is None:
        return (("log-prob", by_logprob),)
    _, best = verifier.bounds_of("grounding")
    by_grounding = tuple(
        Token(piece, _clamp(1 - value / best), f"grounding {value:.3f}")
        for piece, value in zip(tokens.pieces, tokens.grounding, strict=True)
    )
    return (("log-prob", by_logprob), ("grounding", by_grounding))


def _clamp(value: float) -> float:
    return min(1.0, max(0.0, value))


def _phases(solution: Solution) -> list[Span]:
    spent = solution.stats.phase_seconds
    total = solution.stats.seconds or 1.0
    spans = [Span(name, seconds, seconds / total) for name, seconds in spent.items()]
    rest = total - sum(spent.values())
    return [*spans, Span("other", rest, rest / total)] if rest > 0 else spans

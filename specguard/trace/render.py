"""From a solution to HTML: numbers become widths and shades here, the template places them.

The page needs no network and no script; everything that comes from models or users is escaped.
"""

from dataclasses import dataclass
from importlib.resources import files

import jinja2

from specguard.core.config import REWARD, SIGNALS, VerifierConfig
from specguard.core.records import CandidateRecord, Solution, StepRecord, TokenArrays

_COLDEST_LOGPROB = -4.0  # nats; a token that the model gives 2% or less is as hot as it gets


@dataclass(frozen=True, slots=True)
class Bar:
    """A signal of a step: its raw value, its score in [0, 1], and its weight in the ensemble."""

    name: str
    value: float
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
    """What the page shows of a step."""

    record: StepRecord
    label: str
    text: str
    draft_text: str | None
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
        steps=[_step(step, verifier) for step in solution.steps],
        phases=_phases(solution),
        has_detail=any(step.tokens is not None for step in solution.steps),
    )


def _step(record: StepRecord, verifier: VerifierConfig) -> Step:
    labels = {"accepted": "draft, accepted", "rewritten": "target, rewritten"}
    return Step(
        record,
        labels.get(record.decision, record.author),
        record.text.strip(),
        None if record.draft_text is None else record.draft_text.strip(),
        tuple(
            Bar(
                name.replace("_", "-"),
                record.signals[name],
                record.scores[name],
                1.0 if name == REWARD else verifier.weights.get(name, 0.0),
            )
            for name in (REWARD, *SIGNALS)
            if name in record.signals
        ),
        tuple(
            Candidate(
                candidate, index == record.selected, min(candidate.token_logprobs, default=0.0)
            )
            for index, candidate in enumerate(record.candidates or ())
        ),
        _heats(record.tokens, verifier) if record.tokens is not None else (),
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

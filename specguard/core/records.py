"""What a solution leaves behind: a record per step, the solution, its statistics, as JSON too."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import cattrs
from cattrs.gen import make_dict_structure_fn

from specguard.core.config import Author, SolveConfig
from specguard.core.engine import CandidateFinish
from specguard.core.errors import SpecguardError

SCHEMA_VERSION = 2
DOCUMENTED_SCORES = ("log_prob", "grounding", "ensemble")

# "stop": whoever reads the steps wants no more of them.
FinishReason = Literal["answer", "eos", "length", "repetition", "stop"]
Decision = Literal["accepted", "rewritten", "plain"]
AnswerSource = Literal["box", "text"]
Phase = Literal["propose", "select", "verify", "commit", "rewrite"]


@dataclass(frozen=True, slots=True)
class CandidateRecord:
    """One candidate step; ``similarity`` is its mean cosine similarity to the others.

    ``score`` is its ensemble score, None where only the selected one was verified.
    """

    text: str
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    similarity: float
    finish: CandidateFinish
    score: float | None = None


@dataclass(frozen=True, slots=True)
class TokenArrays:
    """Per token of the selected candidate: id, text, log-prob, entropy (nats), grounding."""

    token_ids: tuple[int, ...]
    pieces: tuple[str, ...]
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...] | None
    grounding: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of a solution and why it stands there.

    ``text`` is the step as written, delimiter included; ``draft_text`` the selected candidate's
    where the target rewrote it. ``signals`` are raw values, ``scores`` the same normalised to
    [0, 1], ``ensemble`` among them; both are empty in plain decoding. ``seconds`` is wall time by
    phase. ``num_drafted`` counts the draft's tokens over all candidates. In token-level speculation
    the draft guessed ``num_guessed`` tokens, of which ``num_kept`` stand in the text.
    ``num_reused`` tokens at the beginning of a rewritten step stand because the target, reading a
    rejected candidate, found that it would have written them itself. ``is_fallback`` marks a step
    that the target wrote because drafting did not pay; ``num_spared`` candidates were not drawn
    because the first ones agreed. A step of the draft ``is_given_up`` where the target, reading
    along, saw that no end could save it: ``draft_text``, signals and scores are of its beginning.
    """

    index: int
    text: str
    author: Author
    decision: Decision
    num_tokens: int
    num_drafted: int
    signals: dict[str, float]
    scores: dict[str, float]
    threshold: float | None
    seconds: dict[Phase, float]
    draft_text: str | None = None
    selected: int | None = None
    candidates: tuple[CandidateRecord, ...] | None = None
    tokens: TokenArrays | None = None
    num_guessed: int = 0
    num_kept: int = 0
    num_reused: int = 0
    is_fallback: bool = False
    num_spared: int = 0
    is_given_up: bool = False

    @property
    def is_accepted(self) -> bool:
        """Whether the draft's step passed verification as it was."""
        return self.decision == "accepted"


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts and wall times of a solution.

    Acceptance rates, of steps and of the tokens in them, are None where nothing was verified.
    ``num_target_tokens`` were written by the target one by one; ``num_verified_tokens`` it read in
    parallel passes (catching up included). Token-level speculation kept ``num_kept_tokens`` of the
    ``num_guessed_tokens`` that the draft guessed for it. Rewritten steps begin with
    ``num_reused_tokens`` that the target would have written anyway. Drafting was switched off
    ``num_fallbacks`` times, for ``num_fallback_steps`` in all; ``num_spared_candidates`` were not
    drawn.
    """

    seconds: float
    num_prompt_tokens: int
    num_tokens: int
    num_steps: int
    num_accepted_steps: int
    num_accepted_tokens: int
    num_drafted_tokens: int
    num_target_tokens: int
    num_verified_tokens: int
    step_acceptance_rate: float | None
    token_acceptance_rate: float | None
    tokens_per_second: float
    phase_seconds: dict[Phase, float]
    num_guessed_tokens: int = 0
    num_kept_tokens: int = 0
    num_reused_tokens: int = 0
    num_fallbacks: int = 0
    num_fallback_steps: int = 0
    num_spared_candidates: int = 0


@dataclass(frozen=True, slots=True)
class Solution:
    r"""A solved problem; ``answer`` is the content of the last balanced ``\boxed{}``.

    Where nothing is boxed in a text that the model ended itself, it is the last paragraph, and
    ``answer_source`` is "text". Both are None where there is no answer.

    ``is_reproducible`` says whether other engines of the same models, too, draw the same by the
    same seed; else it is passed on to an engine that has a randomness of its own.
    """

    problem: str
    answer: str | None
    answer_source: AnswerSource | None
    text: str
    finish_reason: FinishReason
    steps: tuple[StepRecord, ...]
    stats: Stats
    config: SolveConfig
    draft: str | None
    target: str | None
    is_calibrated: bool
    is_reproducible: bool = True
    schema_version: int = field(default=SCHEMA_VERSION)

    @property
    def boxed_answer(self) -> str | None:
        """The answer, if it was boxed."""
        return self.answer if self.answer_source == "box" else None

    @property
    def num_drafted_steps(self) -> int:
        """Steps that the draft proposed and something judged; the others are plain."""
        return sum(step.decision != "plain" for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; each step also says ``accepted``."""
        data = asdict(replace(self, steps=()))
        data["steps"] = [step_to_dict(step) for step in self.steps]
        return data

    def to_json(self, indent: int | None = None) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=indent)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Solution":
        """The inverse of `to_dict`, for this schema version and the one before.

        Raises:
            SpecguardError: another schema version, or a field that is missing or of a wrong type.
        """
        version = data.get("schema_version")
        if version == 1:
            data = _from_version_1(data)
        elif version != SCHEMA_VERSION:
            raise SpecguardError(
                f"a solution of schema version {version} cannot be read",
                f"this version of specguard reads schema version {SCHEMA_VERSION}",
            )
        if "answer_source" not in data:  # older ones know boxed answers only
            data = {**data, "answer_source": None if data.get("answer") is None else "box"}
        try:
            return _converter.structure(data, cls)
        except Exception as error:
            details = "; ".join(cattrs.transform_error(error))
            raise SpecguardError(f"this is no stored solution: {details}") from error

    @classmethod
    def from_json(cls, text: str) -> "Solution":
        """The inverse of `to_json`.

        Raises:
            SpecguardError: invalid JSON, or what `from_dict` refuses.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise SpecguardError(f"this is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise SpecguardError("a stored solution is a JSON object")
        return cls.from_dict(data)


def _from_version_1(data: dict[str, Any]) -> dict[str, Any]:
    """Rewrites by token-level speculation are gone."""
    config = data.get("config")
    if isinstance(config, dict):
        config = {name: value for name, value in config.items() if name != "rewrite"}
    return {**data, "config": config, "schema_version": SCHEMA_VERSION}


def step_to_dict(step: StepRecord) -> dict[str, Any]:
    """Plain values for JSON, with ``accepted`` beside the fields.

    The documented scores are always there, null where they were not computed.
    """
    data = asdict(step)
    data["scores"] = {**dict.fromkeys(DOCUMENTED_SCORES), **data["scores"]}
    return {**data, "accepted": step.is_accepted}


def _step_from_dict(data: dict[str, Any], _: object) -> StepRecord:
    scores = {name: value for name, value in data["scores"].items() if value is not None}
    return _structure_step({**data, "scores": scores}, StepRecord)


def _checked(value: Any, wanted: type) -> Any:
    if not isinstance(value, wanted):
        raise TypeError(f"{value!r} is no {wanted.__name__}")
    return value


def summarise(
    steps: Sequence[StepRecord], seconds: float, num_prompt_tokens: int, num_verified_tokens: int
) -> Stats:
    """Totals of a solution's steps."""
    verified = [step for step in steps if step.decision != "plain"]
    accepted = [step for step in verified if step.is_accepted]
    num_tokens = sum(step.num_tokens for step in steps)
    num_accepted_tokens = sum(step.num_tokens for step in accepted)
    num_verified_steps_tokens = sum(step.num_tokens for step in verified)
    phase_seconds: dict[Phase, float] = {}
    for step in steps:
        for phase, duration in step.seconds.items():
            phase_seconds[phase] = phase_seconds.get(phase, 0.0) + duration
    return Stats(
        seconds=seconds,
        num_prompt_tokens=num_prompt_tokens,
        num_tokens=num_tokens,
        num_steps=len(steps),
        num_accepted_steps=len(accepted),
        num_accepted_tokens=num_accepted_tokens,
        num_drafted_tokens=sum(step.num_drafted for step in steps),
        num_target_tokens=sum(
            step.num_tokens - step.num_kept - step.num_reused
            for step in steps
            if step.author == "target"
        ),
        num_verified_tokens=num_verified_tokens,
        step_acceptance_rate=len(accepted) / len(verified) if verified else None,
        token_acceptance_rate=(
            num_accepted_tokens / num_verified_steps_tokens if num_verified_steps_tokens else None
        ),
        tokens_per_second=num_tokens / seconds if seconds > 0 else 0.0,
        phase_seconds=phase_seconds,
        num_guessed_tokens=sum(step.num_guessed for step in steps),
        num_kept_tokens=sum(step.num_kept for step in steps),
        num_reused_tokens=sum(step.num_reused for step in steps),
        num_fallbacks=sum(
            step.is_fallback and not (index and steps[index - 1].is_fallback)
            for index, step in enumerate(steps)
        ),
        num_fallback_steps=sum(step.is_fallback for step in steps),
        num_spared_candidates=sum(step.num_spared for step in steps),
    )


_converter = cattrs.Converter()
_structure_step = make_dict_structure_fn(StepRecord, _converter)
_converter.register_structure_hook(StepRecord, _step_from_dict)
for _type in (str, bool):
    _converter.register_structure_hook(_type, _checked)

"""Settings of a solution, as frozen dataclasses that refuse values that can never work."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from specguard.core.checks import check_types
from specguard.core.engine import GREEDY, Sampling
from specguard.core.errors import UsageError
from specguard.core.fallback import DraftCost

Method = Literal["specguard", "rsd", "target", "draft", "sd"]
Author = Literal["draft", "target"]
Sources = Literal["problem", "context"]

# Signals that a verifier can weigh. Bounds are (value that scores 0, value that scores 1), so an
# entropy's run downwards. They hold for a pair without fitted bounds and are meant to err towards
# the target: a log-probability of -6 is a token that the model gives a chance of 1 in 400. With the
# usual threshold a sum passes from -4.5 on, see docs/measurements.md.
CONSERVATIVE_BOUNDS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "log_prob": (-6.0, 0.0),
        "log_prob_mean": (-2.0, 0.0),
        "log_prob_sum": (-15.0, 0.0),
        "log_prob_numbers": (-6.0, 0.0),
        "entropy_mean": (2.0, 0.0),
        "entropy_max": (4.0, 0.0),
        "sink_mass": (1.0, 0.0),
        "consistency": (0.0, 1.0),
    }
)
REWARD = "reward"  # what a process reward model says of a step, in place of all of them
SIGNALS = (*CONSERVATIVE_BOUNDS, "grounding", "grounding_mean")
# Selectors that take the medoid of embeddings by one of these; a third kind loads a model of that
# package. "target" takes the candidate that the verifier scores highest.
EMBEDDERS = ("draft", "ngram", "numbers")
TARGET_SELECTOR = "target"
SENTENCE_TRANSFORMERS = "sentence-transformers:"
ATTENTION_SIGNALS = frozenset({"grounding", "grounding_mean", "sink_mass"})
ENTROPY_SIGNALS = frozenset({"entropy_mean", "entropy_max"})
# The course of a signal with every further token of a step: downwards (1) or upwards (-1).
_COURSES = {"log_prob": 1, "log_prob_sum": 1, "log_prob_numbers": 1, "entropy_max": -1}


def ensemble_weights(beta: float) -> dict[str, float]:
    """The paper's ensemble: ``beta`` on the log-probability, the rest on grounding.

    Raises:
        UsageError: beta outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise UsageError(f"beta must lie in [0, 1], not {beta}")
    weights = {"log_prob": beta, "grounding": 1 - beta}
    return {name: weight for name, weight in weights.items() if weight > 0}


# Verifiers by name, as changes to a pair's own. "paper" is the published ensemble; the others leave
# parts of it out.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper": {
            "weights": ensemble_weights(0.3),
            "threshold": 0.7,
            "sources": "context",
        },
        "consistency-only": {"weights": {}, "threshold": 0.0},
        "log-prob": {"weights": ensemble_weights(1.0)},
        "grounding": {"weights": ensemble_weights(0.0)},
    }
)
USUAL_TOKENS = 2048  # of a solution without thinking
MAX_CANDIDATES = 4096  # of a step, and tokens guessed ahead; more is a slip of the finger
# How a model thinks, as the cards of Qwen3 and DeepSeek-R1 ask for it: greedily it would go round
# in circles.
THINKING_SAMPLING = Sampling(0.6, 0.95)
# What the paper proposes and selects from.
PAPER_CANDIDATES: Mapping[str, Any] = MappingProxyType(
    {"num_candidates": 16, "sampling": Sampling(0.7, 0.8), "selector": "draft"}
)


@dataclass(frozen=True, slots=True)
class VerifierConfig:
    """Who verifies, by which signals, and from which score on a step is accepted.

    ``weights`` of signals sum to 1; without any, every step is accepted unseen (self-consistency
    only). ``bounds`` override `CONSERVATIVE_BOUNDS` signal by signal. Rollout settings
    are those of the paper: ``num_layers`` L, ``epsilon``, and ``residual`` r.

    Raises:
        UsageError: an unknown name, a number outside its range, or a value of another type.
    """

    model: Author = "target"
    weights: Mapping[str, float] = field(default_factory=lambda: {"log_prob_sum": 1.0})
    threshold: float = 0.7
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    sources: Sources = "problem"
    num_layers: int = 3
    epsilon: float = 0.01
    residual: float = 0.5

    def __post_init__(self) -> None:
        check_types(self)
        if self.model not in ("draft", "target"):
            raise UsageError(f"verifier must be 'draft' or 'target', not {self.model!r}")
        if self.sources not in ("problem", "context"):
            raise UsageError(f"sources must be 'problem' or 'context', not {self.sources!r}")
        for name in (*self.weights, *self.bounds):
            if name not in SIGNALS:
                known = ", ".join(SIGNALS)
                raise UsageError(f"no signal is called {name!r}", f"signals: {known}")
        if self.weights and not (
            all(0 <= w <= 1 for w in self.weights.values())
            and abs(sum(self.weights.values()) - 1) < 1e-6
        ):
            raise UsageError(f"weights must be shares of 1, not {dict(self.weights)}")
        if any(low == high for low, high in self.bounds.values()):
            raise UsageError(f"bounds of a signal must differ: {dict(self.bounds)}")
        for name in ("threshold", "epsilon", "residual"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        if self.num_layers < 1:
            raise UsageError(f"num_layers must be at least 1, not {self.num_layers}")

    def asking(self, model: Author) -> "VerifierConfig":
        """The same with another model's signals; bounds fitted to the first one's are dropped."""
        return self if model == self.model else replace(self, model=model, bounds={})

    def bounds_of(self, signal: str) -> tuple[float, float]:
        """The values that score 0 and 1: fitted ones, else conservative ones.

        Grounding is bounded by 1 - r**L, what the residual leaves of L layers.
        """
        if signal in self.bounds:
            return self.bounds[signal]
        if signal in CONSERVATIVE_BOUNDS:
            return CONSERVATIVE_BOUNDS[signal]
        return 0.0, max(1 - self.residual**self.num_layers, 1e-9)

    @property
    def needs_attention(self) -> bool:
        """Whether a weighed signal comes from attention."""
        return any(self.weights.get(name, 0) > 0 for name in ATTENTION_SIGNALS)

    @property
    def needs_entropy(self) -> bool:
        """Whether a weighed signal comes from whole distributions."""
        return any(self.weights.get(name, 0) > 0 for name in ENTROPY_SIGNALS)

    @property
    def needs_model(self) -> bool:
        """Whether a weighed signal comes from the verifying model at all."""
        return any(name != "consistency" for name in self.weights)

    @property
    def asks_target(self) -> bool:
        """Whether the target has to read the draft's steps."""
        return self.needs_model and self.model == "target"

    @property
    def can_only_fall(self) -> bool:
        """Whether no further token of a step raises its score."""
        for name, weight in self.weights.items():
            low, high = self.bounds_of(name)
            if weight > 0 and (high - low) * _COURSES.get(name, 0) <= 0:
                return False
        return True

    @property
    def is_calibrated(self) -> bool:
        """Whether every weighed signal has bounds fitted to the pair."""
        return all(name in self.bounds for name in self.weights)


@dataclass(frozen=True, slots=True)
class SolveConfig:
    """Everything that decides a solution, besides the models and the problem.

    ``method`` "target" or "draft" is plain decoding by that model, "sd" token-level speculative
    sampling of the target. ``num_speculated`` is how many tokens the draft guesses ahead there, and
    in steps that the target writes in other methods; None: as many as pay by the ``draft_cost``, 0:
    none. "rsd" is reward-guided
    speculative decoding (Liao et al. 2025): a process reward model judges the draft's steps, which
    pass from ``reward_threshold`` on; one candidate a step is usual there. ``num_first_candidates``
    are drawn first and the others only where these disagree. ``draft_cost`` lets the target go on
    alone while drafting does not pay; None drafts always. ``sampling`` is how steps are proposed
    (plain decoding: written); None means temperature 0.7 and top-p 0.8 for several candidates,
    greedy for one and for plain decoding. ``selector`` names an embedder, whose medoid is kept, or
    is "target": it reads all candidates in one pass and the best ensemble score is kept. Without
    ``max_tokens`` a solution has `USUAL_TOKENS`, or, where the model thinks before it answers, all
    that the context window holds; ``max_steps`` None is no limit. ``detail`` keeps every candidate
    and the token arrays in the step records.

    Raises:
        UsageError: a value of another type, a count below 1 or absurdly large, a negative seed, an
            unknown name, the target as selector where it does not verify.
    """

    method: Method = "specguard"
    num_candidates: int = 1
    num_first_candidates: int | None = None
    sampling: Sampling | None = None
    rewrite_sampling: Sampling = GREEDY
    num_speculated: int | None = None
    reward_threshold: float = 0.7
    draft_cost: DraftCost | None = None
    selector: str = TARGET_SELECTOR
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    delimiter: str = "\n\n"
    max_step_tokens: int = 256
    max_tokens: int | None = None
    max_steps: int | None = None
    seed: int = 0
    system_prompt: str | None = None
    thinking: bool = False
    detail: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if self.method not in get_args(Method):
            known = ", ".join(get_args(Method))
            raise UsageError(f"no method is called {self.method!r}", f"methods: {known}")
        for name in (
            "num_candidates",
            "max_step_tokens",
            "max_tokens",
            "max_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        least = 1 if self.method == "sd" else 0
        if self.num_speculated is not None and self.num_speculated < least:
            raise UsageError(f"num_speculated must be at least {least}, not {self.num_speculated}")
        for name in ("num_candidates", "num_speculated"):
            if (getattr(self, name) or 0) > MAX_CANDIDATES:
                raise UsageError(
                    f"{name} must be at most {MAX_CANDIDATES}, not {getattr(self, name)}"
                )
        first = self.num_first_candidates
        if first is not None and not 2 <= first <= self.num_candidates:
            raise UsageError(
                f"candidates drawn first must be 2 to {self.num_candidates}, not {first}"
            )
        if not 0 <= self.reward_threshold <= 1:
            raise UsageError(f"reward_threshold must lie in [0, 1], not {self.reward_threshold}")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed must lie in [0, 2**64), not {self.seed}")
        if not self.delimiter.isascii() or not self.delimiter:
            # Other characters may be spread over tokens, where no token completes them.
            raise UsageError("the step delimiter must be ASCII text, one character or more")
        if self.selector == TARGET_SELECTOR:
            if self.num_candidates > 1 and not self.verifier.asks_target:
                raise UsageError(
                    "the target selects by the verifier's score, and this verifier does not ask it",
                    "choose verifier 'target' with a weight on one of its signals, or another "
                    "selector",
                )
        elif self.selector not in EMBEDDERS and not (
            self.selector.startswith(SENTENCE_TRANSFORMERS)
            and self.selector != SENTENCE_TRANSFORMERS
        ):
            known = ", ".join((TARGET_SELECTOR, *EMBEDDERS, f"{SENTENCE_TRANSFORMERS}NAME"))
            raise UsageError(f"no selector is called {self.selector!r}", f"selectors: {known}")

    @property
    def authors(self) -> tuple[Author, ...]:
        """The models that the method needs."""
        if self.method == "target" or self.method == "draft":
            return (self.method,)
        return "draft", "target"

    def most_tokens(self, window: int, thinks: bool) -> int:
        """Most tokens of a solution for which the context window has room for ``window``."""
        if self.max_tokens is None:
            return window if thinks else min(window, USUAL_TOKENS)
        return min(window, self.max_tokens)

    @property
    def is_stepwise(self) -> bool:
        """Whether the draft proposes steps that something judges."""
        return self.method in ("specguard", "rsd")

    @property
    def step_sampling(self) -> Sampling:
        """How steps are proposed, or written in plain decoding."""
        if self.sampling is not None:
            return self.sampling
        # Sampling is what makes several candidates differ; a single one is to be the likeliest.
        is_several = self.is_stepwise and self.num_candidates > 1
        return Sampling() if is_several else GREEDY


def changed_settings(config: SolveConfig) -> dict[str, Any]:
    """The fields that differ from `SolveConfig`'s own, as plain values for JSON.

    By these, runs of the same settings are known again: a field that is new does not appear until
    somebody sets it.
    """
    plain = SolveConfig()
    changes = {
        name: getattr(config, name)
        for name in SolveConfig.__dataclass_fields__
        if getattr(config, name) != getattr(plain, name)
    }
    if "verifier" in changes:
        changes["verifier"] = {
            name: getattr(config.verifier, name)
            for name in VerifierConfig.__dataclass_fields__
            if getattr(config.verifier, name) != getattr(plain.verifier, name)
        }
    return {name: _plain(value) for name, value in sorted(changes.items())}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in sorted(value.items())}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value

"""A draft and a target put together: whether they fit each other, and what settings need of them.

What an engine lacks is found here, before the first step, and nowhere else.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from specguard.core.config import TARGET_SELECTOR, Author, SolveConfig, ensemble_weights
from specguard.core.engine import Engine, Feature, Tokenizer
from specguard.core.errors import SpecguardError, UsageError
from specguard.core.reward import RewardModel


@dataclass(frozen=True, slots=True)
class Pair:
    """Two engines that map text to the same ids; a plain method needs one of them only.

    ``reward`` judges the draft's steps in method "rsd".

    Raises:
        SpecguardError: a token has another id in the other model, or none; the message names it.
            Padded embedding rows without a token do not count.
    """

    draft: Engine | None = None
    target: Engine | None = None
    reward: RewardModel | None = None

    def __post_init__(self) -> None:
        if self.draft is not None and self.target is not None:
            _check_vocabularies(self.draft, self.target)

    def engines_for(self, config: SolveConfig) -> dict[Author, Engine]:
        """The engines that the settings use.

        Raises:
            UsageError: one of them, or the reward model, is missing.
            SpecguardError: an engine lacks a feature that the settings cannot do without.
        """
        engines: dict[Author, Engine] = {}
        for author in config.authors:
            engine = self.draft if author == "draft" else self.target
            if engine is None:
                raise UsageError(f"method {config.method!r} needs a {author} model")
            engines[author] = engine
        if config.method == "rsd" and self.reward is None:
            raise UsageError(
                "method 'rsd' needs a reward model", "name one, or choose another method"
            )
        if config.method == "specguard":
            verifying = engines[config.verifier.model]
            if config.verifier.needs_attention or config.verifier.asks_target:
                hint = "another engine for the target, or --verifier draft"
                _require(verifying, "scoring", f"it is the {config.verifier.model}", hint)
            hint = "verify by log-probability alone: --beta 1"
            if config.verifier.needs_attention:
                _require(verifying, "attention", "the verifier weighs grounding", hint)
            if config.verifier.needs_entropy:
                _require(verifying, "entropy", "the verifier weighs it", hint)
        if config.method == "sd" or (config.is_stepwise and config.num_speculated):
            hint = "choose another method" if config.method == "sd" else "leave --speculate out"
            for author, feature in _needed_to_guess(config):
                _require(engines[author], feature, "token-level speculation compares them", hint)
        if self.embedder_for(config) == "draft":
            _require(
                engines["draft"],
                "hidden states",
                "the selector 'draft' compares candidates by them",
                "choose --selector ngram",
            )
        return engines

    def can_guess(self, config: SolveConfig) -> bool:
        """Whether the draft can guess the target's tokens."""
        engines = self.engines_for(config)
        return len(engines) == 2 and all(
            feature in engines[author].features for author, feature in _needed_to_guess(config)
        )

    def tokenizer_for(self, config: SolveConfig) -> Tokenizer:
        """The tokenizer that prompts and texts go through.

        Raises:
            UsageError: a model is missing.
            SpecguardError: an engine lacks what the settings cannot do without.
        """
        engines = self.engines_for(config)
        return (engines.get("target") or engines["draft"]).tokenizer

    def embedder_for(self, config: SolveConfig) -> str | None:
        """What measures the consistency of candidates, by name; None where there is one alone.

        The selector's, or, where the target selects, what costs least.
        """
        if not config.is_stepwise or config.num_candidates == 1:
            return None
        if config.selector != TARGET_SELECTOR:
            return config.selector
        has_states = self.draft is None or "hidden states" in self.draft.features
        return "draft" if has_states else "ngram"

    def degraded(
        self, config: SolveConfig, chosen: Collection[str] = ()
    ) -> tuple[SolveConfig, list[str]]:
        """Settings that nobody chose, changed to what these engines can do, and what was changed.

        Without attention, the log-probability alone verifies; without hidden states, the selector
        is ``ngram``. The "weights" of the verifier and the "selector" stay where they are
        ``chosen``.
        """
        notes = []
        verifying = self.draft if config.verifier.model == "draft" else self.target
        if (
            config.method == "specguard"
            and "weights" not in chosen
            and verifying is not None
            and config.verifier.needs_attention
            and "attention" not in verifying.features
        ):
            verifier = replace(config.verifier, weights=ensemble_weights(1.0))
            config = replace(config, verifier=verifier)
            notes.append(f"verified by log-probability alone: {_lack(verifying, 'attention')}")
        if (
            self.draft is not None
            and "selector" not in chosen
            and self.embedder_for(config) == "draft"
            and "hidden states" not in self.draft.features
        ):
            config = replace(config, selector="ngram")
            lack = _lack(self.draft, "hidden states")
            notes.append(f"candidates are compared by their words: {lack}")
        return config, notes


def _needed_to_guess(config: SolveConfig) -> list[tuple[Author, Feature]]:
    """What engines must have for the draft to guess the target's tokens."""
    sampling = config.step_sampling if config.method == "sd" else config.rewrite_sampling
    if sampling.is_greedy:
        return [("target", "choices")]
    return [("draft", "distributions"), ("target", "distributions")]


def _require(engine: Engine, feature: Feature, purpose: str, hint: str) -> None:
    if feature not in engine.features:
        raise SpecguardError(f"{_lack(engine, feature)}; {purpose}", hint)


def _lack(engine: Engine, feature: Feature) -> str:
    reason = engine.reasons.get(feature)
    return f"{engine.name} has no {feature}" + (f" ({reason})" if reason else "")


def _check_vocabularies(draft: Engine, target: Engine) -> None:
    ours, theirs = draft.tokenizer.vocabulary, target.tokenizer.vocabulary
    if ours == theirs:
        return
    hint = "choose two models of one family, with the same tokenizer"
    for token, token_id in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != token_id:
            raise SpecguardError(
                f"draft {draft.name} and target {target.name} have different token mappings: "
                f"{token!r} is {token_id} in the draft and {theirs.get(token, 'missing')} in the "
                "target",
                hint,
            )
    token = min(theirs.keys() - ours.keys(), key=theirs.__getitem__)
    raise SpecguardError(
        f"draft {draft.name} and target {target.name} have different token mappings: "
        f"{token!r} is {theirs[token]} in the target and missing in the draft",
        hint,
    )

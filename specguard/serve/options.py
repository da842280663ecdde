"""From a request's options to changes of the server's settings."""

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from specguard.core.config import (
    PAPER_CANDIDATES,
    PRESETS,
    TARGET_SELECTOR,
    THINKING_SAMPLING,
    SolveConfig,
)
from specguard.core.engine import GREEDY, Sampling
from specguard.core.errors import UsageError
from specguard.loading import changed_verifier
from specguard.serve.schema import Request, SpecguardOptions

_STEPWISE = ("specguard", "rsd")
# Options that only some methods have a use for.
_LIMITED = {
    "k": _STEPWISE,
    "verifier": ("specguard",),
    "threshold": _STEPWISE,
    "preset": ("specguard",),
    "selector": _STEPWISE,
    "speculate": ("sd", *_STEPWISE),
}
_RENAMED = {"k": "num_candidates", "speculate": "num_speculated"}
_AS_THEY_ARE = ("method", "k", "selector", "speculate", "max_step_tokens", "max_steps", "detail")


def changes_for(
    request: Request, config: SolveConfig, max_tokens: int | None = None
) -> dict[str, Any]:
    """Changes to the server's settings; the seed is always among them.

    A temperature is of all that is drawn, the target's rewrites included. Where one above 0 is
    given and no seed, the seed is any.

    Raises:
        UsageError: a value that can never work, or that the method has no use for.
    """
    own = request.specguard
    method = own.method or config.method
    given = own.model_dump(exclude_unset=True)
    for name, methods in _LIMITED.items():
        if name in given and method not in methods:
            raise UsageError(f"specguard.{name} has no meaning with method {method!r}")
    changes = {_RENAMED.get(name, name): given[name] for name in _AS_THEY_ARE if name in given}
    if method != config.method:
        changes = {**_of_method(method, config), **changes}
    if max_tokens is not None:
        changes["max_tokens"] = max_tokens
    if not own.fallback:
        changes["draft_cost"] = None
    if own.thinking is not None:
        changes["thinking"] = own.thinking
        drawn = THINKING_SAMPLING if own.thinking else None
        changes |= {"sampling": drawn, "rewrite_sampling": drawn or GREEDY}
    if own.threshold is not None and method == "rsd":
        changes["reward_threshold"] = own.threshold
    if method == "specguard":
        changes = {**_of_verifier(own, config), **changes}
    changes |= _sampling(request, replace(config, **changes))
    return changes | {"seed": _seed(request, config)}


def _of_method(method: str, config: SolveConfig) -> dict[str, Any]:
    if method != "rsd":
        return {}
    # One greedy candidate is the published method; the target does not select there.
    selector = "draft" if config.selector == TARGET_SELECTOR else config.selector
    return {"num_candidates": 1, "selector": selector}


def _of_verifier(own: SpecguardOptions, config: SolveConfig) -> dict[str, Any]:
    changes: dict[str, Any] = dict(PRESETS[own.preset]) if own.preset else {}
    for name, value in (
        ("threshold", own.threshold),
        ("model", own.verifier),
    ):
        if value is not None:
            changes[name] = value
    if not changes:
        return {}
    verifier = changed_verifier(config.verifier, changes)
    more: Mapping[str, Any] = PAPER_CANDIDATES if own.preset else {}
    # Where the target does not verify, it cannot select.
    if not more and verifier.model != "target" and config.selector == TARGET_SELECTOR:
        more = {"selector": "draft"}
    return {**more, "verifier": verifier}


def _sampling(request: Request, config: SolveConfig) -> dict[str, Any]:
    if request.temperature is None and request.top_p is None:
        return {}

    def changed(usual: Sampling) -> Sampling:
        temperature = usual.temperature if request.temperature is None else request.temperature
        return Sampling(temperature, usual.top_p if request.top_p is None else request.top_p)

    proposed, rewritten = changed(config.step_sampling), changed(config.rewrite_sampling)
    return {"sampling": proposed, "rewrite_sampling": rewritten}


def _seed(request: Request, config: SolveConfig) -> int:
    if request.seed is not None:
        return request.seed % 2**64
    return secrets.randbits(53) if request.temperature else config.seed

"""SpecGuard: step-level speculative decoding that shows why it trusted each step.

``specguard.load().solve("...")`` solves with the default pair; `specguard.core` works with any
`specguard.core.Engine`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specguard.core import (
        DraftCost,
        Sampling,
        Solution,
        SolveConfig,
        Solver,
        SpecguardError,
        StepRecord,
        UsageError,
        VerifierConfig,
        ensemble_weights,
        solve_many,
    )
    from specguard.loading import load

__version__ = "0.2.0"

__all__ = [
    "DraftCost",
    "Sampling",
    "Solution",
    "SolveConfig",
    "Solver",
    "SpecguardError",
    "StepRecord",
    "UsageError",
    "VerifierConfig",
    "__version__",
    "ensemble_weights",
    "load",
    "solve_many",
]

_MODULES = ("backends", "core", "loading", "models")


def __getattr__(name: str) -> Any:
    """Import what is asked for, and nothing before: an interruption at the start is heard."""
    if name in _MODULES:
        return import_module(f"specguard.{name}")
    if name in __all__:
        home = "specguard.loading" if name == "load" else "specguard.core"
        return getattr(import_module(home), name)
    raise AttributeError(f"module 'specguard' has no attribute {name!r}")

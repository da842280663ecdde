"""SpecGuard: step-level speculative decoding that shows why it trusted each step.

``specguard.load().solve("...")`` solves with the default pair; `specguard.core` works with any
`specguard.core.LanguageModel`.
"""

from specguard.core import (
    DraftCost,
    Engine,
    Sampling,
    Solution,
    SolveConfig,
    SpecguardError,
    StepRecord,
    UsageError,
    VerifierConfig,
    ensemble_weights,
    solve_many,
)
from specguard.loading import load

__version__ = "0.1.0"

__all__ = [
    "DraftCost",
    "Engine",
    "Sampling",
    "Solution",
    "SolveConfig",
    "SpecguardError",
    "StepRecord",
    "UsageError",
    "VerifierConfig",
    "__version__",
    "ensemble_weights",
    "load",
    "solve_many",
]

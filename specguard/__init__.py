"""SpecGuard: step-level speculative decoding that shows why it trusted each step.

``specguard.load().solve("...")`` solves with the default pair; `specguard.core` works with any
`specguard.core.Engine`.
"""

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

"""Step-level speculative decoding against an abstract engine: loop, selector, verifier, records."""

from specguard.core.config import SolveConfig, VerifierConfig, ensemble_weights
from specguard.core.engine import (
    ALL_FEATURES,
    GREEDY,
    AttentionBlock,
    Boundary,
    Candidate,
    Capture,
    Engine,
    Feature,
    GenerateJob,
    Observation,
    Prompt,
    Sampling,
    ScoreJob,
    Tokenizer,
)
from specguard.core.errors import SpecguardError, UsageError
from specguard.core.fallback import DraftCost
from specguard.core.loop import Solving
from specguard.core.many import Finished, Task, solve_many, solve_many_async
from specguard.core.pairing import Pair
from specguard.core.progress import PhaseBegan, Progress, TokensDrawn
from specguard.core.records import Solution, Stats, StepRecord
from specguard.core.reward import RewardModel
from specguard.core.solver import Solver, StepStream
from specguard.core.text import PieceTable, StepScanner, final_answer

__all__ = [
    "ALL_FEATURES",
    "GREEDY",
    "AttentionBlock",
    "Boundary",
    "Candidate",
    "Capture",
    "DraftCost",
    "Engine",
    "Feature",
    "Finished",
    "GenerateJob",
    "Observation",
    "Pair",
    "PhaseBegan",
    "PieceTable",
    "Progress",
    "Prompt",
    "RewardModel",
    "Sampling",
    "ScoreJob",
    "Solution",
    "SolveConfig",
    "Solver",
    "Solving",
    "SpecguardError",
    "Stats",
    "StepRecord",
    "StepScanner",
    "StepStream",
    "Task",
    "Tokenizer",
    "TokensDrawn",
    "UsageError",
    "VerifierConfig",
    "ensemble_weights",
    "final_answer",
    "solve_many",
    "solve_many_async",
]

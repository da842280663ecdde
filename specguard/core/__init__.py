"""Step-level speculative decoding against an abstract model: loop, selector, verifier, records."""

from specguard.core.config import SolveConfig, VerifierConfig, ensemble_weights
from specguard.core.drafting import WholeDrafting
from specguard.core.engine import Engine
from specguard.core.errors import SpecguardError, UsageError
from specguard.core.fallback import DraftCost
from specguard.core.loop import solve_steps
from specguard.core.model import (
    GREEDY,
    Acceptance,
    AttentionBlock,
    Boundary,
    Candidate,
    Capture,
    Drafting,
    LanguageModel,
    Observation,
    Prompt,
    Sampling,
    Tokenizer,
    TokenSequence,
)
from specguard.core.records import Solution, Stats, StepRecord
from specguard.core.reward import RewardModel, RewardSequence
from specguard.core.schedule import Finished, Task, solve_many
from specguard.core.text import PieceTable, StepScanner, final_answer

__all__ = [
    "GREEDY",
    "Acceptance",
    "AttentionBlock",
    "Boundary",
    "Candidate",
    "Capture",
    "DraftCost",
    "Drafting",
    "Engine",
    "Finished",
    "LanguageModel",
    "Observation",
    "PieceTable",
    "Prompt",
    "RewardModel",
    "RewardSequence",
    "Sampling",
    "Solution",
    "SolveConfig",
    "SpecguardError",
    "Stats",
    "StepRecord",
    "StepScanner",
    "Task",
    "TokenSequence",
    "Tokenizer",
    "UsageError",
    "VerifierConfig",
    "WholeDrafting",
    "ensemble_weights",
    "final_answer",
    "solve_many",
    "solve_steps",
]

"""Step-level speculative decoding against an abstract model: loop, selector, verifier, records."""

from specguard.core.config import SolveConfig, VerifierConfig, ensemble_weights
from specguard.core.engine import Engine
from specguard.core.errors import SpecguardError, UsageError
from specguard.core.loop import solve_steps
from specguard.core.model import (
    GREEDY,
    Acceptance,
    AttentionBlock,
    Boundary,
    Candidate,
    Capture,
    LanguageModel,
    Observation,
    Prompt,
    Sampling,
    Tokenizer,
    TokenSequence,
)
from specguard.core.records import Solution, Stats, StepRecord
from specguard.core.reward import RewardModel, RewardSequence
from specguard.core.text import PieceTable, StepScanner, final_answer

__all__ = [
    "GREEDY",
    "Acceptance",
    "AttentionBlock",
    "Boundary",
    "Candidate",
    "Capture",
    "Engine",
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
    "TokenSequence",
    "Tokenizer",
    "UsageError",
    "VerifierConfig",
    "ensemble_weights",
    "final_answer",
    "solve_steps",
]

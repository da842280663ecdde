"""The engine: a checked pair of models with settings, ready to solve problems."""

from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

from specguard.core.config import SolveConfig
from specguard.core.embedders import load_embedder
from specguard.core.loop import solve_by_requests, solve_steps
from specguard.core.model import LanguageModel
from specguard.core.pairing import check_pair
from specguard.core.records import Solution, StepRecord
from specguard.core.requests import Request
from specguard.core.reward import RewardModel
from specguard.core.selector import Embedder


class StepStream(Iterator[StepRecord]):
    """The steps of one solution, each as it is decided; ``solution`` is there after the last.

    Leaving the ``with`` block, or `close`, stops the work and frees the sequences.
    """

    def __init__(self, steps: Generator[StepRecord, None, Solution]) -> None:
        self._steps = steps
        self.solution: Solution | None = None

    def __next__(self) -> StepRecord:
        try:
            return next(self._steps)
        except StopIteration as stop:
            if stop.value is not None:
                self.solution = stop.value
            raise

    def __enter__(self) -> "StepStream":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop after the step in hand; a finished stream is left as it is."""
        self._steps.close()


class Engine:
    """Solves problems with a draft and a target; a plain method needs one of them only.

    ``reward`` judges the draft's steps in method "rsd".

    Raises:
        SpecguardError: the two models map text to different token ids.
    """

    def __init__(
        self,
        draft: LanguageModel[Any] | None = None,
        target: LanguageModel[Any] | None = None,
        config: SolveConfig | None = None,
        reward: RewardModel | None = None,
    ) -> None:
        if draft is not None and target is not None:
            check_pair(draft, target)
        self.draft = draft
        self.target = target
        self.config = config or SolveConfig()
        self.reward = reward
        self._embedders: dict[str, Embedder] = {}

    def stream(self, problem: str, **changes: Any) -> StepStream:
        """Iterate over the steps of a solution while it is made.

        ``changes`` replace fields of the engine's `SolveConfig` for this problem.

        Raises:
            UsageError: a change that `SolveConfig` refuses. While iterating, what `solve_steps`
                raises.
        """
        config = self.configured(**changes)
        embed = self.embedder(config)
        return StepStream(solve_steps(problem, self.draft, self.target, embed, config, self.reward))

    def requests(
        self, problem: str, **changes: Any
    ) -> Generator[Request | StepRecord, Any, Solution]:
        """`stream`, with the calls of the models left to whoever sends their results."""
        config = self.configured(**changes)
        embed = self.embedder(config)
        return solve_by_requests(problem, self.draft, self.target, embed, config, self.reward)

    def configured(self, **changes: Any) -> SolveConfig:
        """The engine's settings with changes.

        Raises:
            UsageError: a change that `SolveConfig` refuses.
        """
        return replace(self.config, **changes)

    def embedder(self, config: SolveConfig) -> Embedder:
        """What measures consistency under these settings; each one is loaded once.

        Raises:
            SpecguardError: its package or its model is not installed.
        """
        # Plain decoding selects nothing, so it asks for no package.
        name = config.embedder if config.method == "specguard" else "draft"
        embed = self._embedders.get(name)
        if embed is None:
            embed = self._embedders[name] = load_embedder(name)
        return embed

    def solve(self, problem: str, **changes: Any) -> Solution:
        """The solution of a problem; arguments and errors as in `stream`."""
        with self.stream(problem, **changes) as steps:
            for _ in steps:
                pass
        assert steps.solution is not None
        return steps.solution

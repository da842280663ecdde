"""The solver: a pair of engines with settings, ready to solve problems."""

from collections.abc import Collection, Generator, Iterator
from dataclasses import replace
from typing import Any

from specguard.core.config import Author, SolveConfig
from specguard.core.embedders import embed_by_ngrams, load_embedder
from specguard.core.engine import Engine, Prompt
from specguard.core.errors import UsageError
from specguard.core.loop import Solving
from specguard.core.pairing import Pair
from specguard.core.progress import Observer
from specguard.core.records import Solution, StepRecord
from specguard.core.reward import RewardModel
from specguard.core.runner import drain
from specguard.core.selector import Embedder


class StepStream(Iterator[StepRecord]):
    """The steps of one solution, each as it is decided; ``solution`` is there after the last.

    Leaving the ``with`` block, or `close`, stops the work and frees what the engines hold of it.
    """

    def __init__(self, solving: Solving) -> None:
        self._solving = solving
        self._steps: Generator[StepRecord] = drain(solving.steps())
        self.solution: Solution | None = None

    def __next__(self) -> StepRecord:
        try:
            return next(self._steps)
        except StopIteration:
            if self._solving.recorder.finish_reason is not None and self.solution is None:
                self.solution = self._solving.solution()
            raise

    def __enter__(self) -> "StepStream":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop after the step in hand; a finished stream is left as it is."""
        self._steps.close()


class Solver:
    """Solves problems with a draft and a target; a plain method needs one of them only.

    ``reward`` judges the draft's steps in method "rsd". ``notes`` are what a user should know of
    how the pair was put together.

    Raises:
        SpecguardError: the two models map text to different token ids.
    """

    def __init__(
        self,
        draft: Engine | None = None,
        target: Engine | None = None,
        config: SolveConfig | None = None,
        reward: RewardModel | None = None,
    ) -> None:
        self.pair = Pair(draft, target, reward)
        self.notes: list[str] = []
        self.config = config or SolveConfig()
        self._embedders: dict[str, Embedder] = {}

    @property
    def draft(self) -> Engine | None:
        """The engine that proposes steps."""
        return self.pair.draft

    @property
    def target(self) -> Engine | None:
        """The engine that verifies and rewrites."""
        return self.pair.target

    def begin(
        self,
        problem: str,
        *,
        on_progress: Observer | None = None,
        observed: Collection[Author] = ("draft", "target"),
        prompt: Prompt | None = None,
        shares_passes: bool = False,
        **changes: Any,
    ) -> Solving:
        """One problem, to be solved by iterating over its ``steps()`` in an event loop.

        ``prompt`` is what the models read, for example a conversation that ends with the problem;
        None puts the problem behind the system prompt of the settings. ``on_progress`` is called
        with every `Progress` event, in the thread that does the work, tokens of those who are
        ``observed`` among them; an exception that it raises ends the problem. Where others are
        solved beside it, it ``shares_passes``, and nothing is guessed unless somebody asks.
        ``changes`` replace fields of the solver's `SolveConfig` for this problem.

        Raises:
            UsageError: a change that `SolveConfig` refuses, or a blank problem.
            SpecguardError: what `Solving` raises, or the selector's package is not installed.
        """
        config = self.configured(**changes)
        return Solving(
            problem,
            self.pair,
            self.embedder(config),
            config,
            on_progress,
            prompt,
            observed,
            shares_passes,
        )

    def stream(
        self, problem: str, *, on_progress: Observer | None = None, **changes: Any
    ) -> StepStream:
        """Iterate over the steps of a solution while it is made; arguments as in `begin`."""
        return StepStream(self.begin(problem, on_progress=on_progress, **changes))

    def solve(
        self, problem: str, *, on_progress: Observer | None = None, **changes: Any
    ) -> Solution:
        """The solution of a problem; arguments and errors as in `begin`."""
        with self.stream(problem, on_progress=on_progress, **changes) as steps:
            for _ in steps:
                pass
        assert steps.solution is not None
        return steps.solution

    async def solve_async(
        self,
        problem: str,
        *,
        on_progress: Observer | None = None,
        shares_passes: bool = False,
        **changes: Any,
    ) -> Solution:
        """`solve` in an event loop; many at once share the engines' passes."""
        solving = self.begin(
            problem, on_progress=on_progress, shares_passes=shares_passes, **changes
        )
        async for _ in solving.steps():
            pass
        return solving.solution()

    def configured(self, **changes: Any) -> SolveConfig:
        """The solver's settings with changes.

        Raises:
            UsageError: an unknown setting, or a value that `SolveConfig` refuses.
        """
        unknown = changes.keys() - set(SolveConfig.__dataclass_fields__)
        if unknown:
            raise UsageError(f"no setting is called {min(unknown)!r}")
        return replace(self.config, **changes)

    def embedder(self, config: SolveConfig) -> Embedder:
        """What measures consistency under these settings; each one is loaded once.

        Raises:
            SpecguardError: its package or its model is not installed.
        """
        name = self.pair.embedder_for(config)
        if name is None:  # a single candidate is not compared
            return embed_by_ngrams
        embed = self._embedders.get(name)
        if embed is None:
            embed = self._embedders[name] = load_embedder(name)
        return embed

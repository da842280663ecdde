"""Many problems at once: their requests of one kind go to the model in one call.

Drawing steps, which takes a pass for every token, waits until nothing else is wanted. It goes on
until some problems have theirs; these are verified and come back to join the others. Problems whose
step the target has to write wait for one another, and whoever finishes makes room for the next one
in the queue. A solution depends neither on the other problems nor on how many there are.
"""

import math
from collections import Counter
from collections.abc import Generator, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from specguard.core.config import SolveConfig
from specguard.core.engine import Engine
from specguard.core.errors import SpecguardError, UsageError
from specguard.core.model import Candidate, Drafting, LanguageModel, Prompt, TokenSequence
from specguard.core.records import Solution, StepRecord
from specguard.core.requests import Propose, Request, Start, perform, shared_time
from specguard.core.shortcuts import uses

_SHORTEST_PREFIX = 8  # tokens; a shorter beginning costs less to read than to look after
# Buffers double when they are full, and a batch is laid side by side in one more buffer.
_BYTES_PER_BYTE = 4
_SOME = 0.25  # of the problems that are drawn for; so many steps are waited for
_PATIENCE = 16  # times that a kind of drawing waits before it goes first


@dataclass(frozen=True, slots=True)
class Task:
    """A problem, and changes to the settings for it alone."""

    problem: str
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finished:
    """What became of the problem with this number: its solution, or why there is none."""

    index: int
    solution: Solution | None = None
    error: SpecguardError | None = None


def solve_many(
    engine: Engine,
    problems: Iterable[str | Task],
    *,
    batch_size: int = 8,
    memory_budget: int | None = None,
    **changes: Any,
) -> Iterator[Finished]:
    """Solve problems side by side; each one's outcome is yielded as soon as it is there.

    An error of one problem is its outcome and leaves the others alone.

    Args:
        engine: a pair with settings.
        problems: texts, or `Task`s where settings differ; read as there is room for them.
        batch_size: most problems at a time.
        memory_budget: bytes that keys and values may take at most; problems wait until there is
            room for the longest solution that their settings allow. None sets no limit.
        changes: to the engine's settings, for all of them.

    Raises:
        UsageError: a batch size below 1, or a setting that `SolveConfig` refuses.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {batch_size}")
    engine.configured(**changes)
    tasks = (
        Task(task.problem, {**changes, **task.changes})
        if isinstance(task, Task)
        else Task(task, changes)
        for task in problems
    )
    return _Schedule(engine, tasks, batch_size, memory_budget).run()


@dataclass(slots=True, eq=False)
class _Open:
    """A problem that is being solved and what it wants next."""

    index: int
    solving: Generator[Request | StepRecord, Any, Solution]
    num_bytes: int
    wants: Request | None = None

    @property
    def request(self) -> Any:
        """What it wants, a `Request`."""
        assert self.wants is not None
        return self.wants


@dataclass(slots=True)
class _Call:
    """A drafting under way and the problems that have joined it."""

    drafting: Drafting[Any]
    joined: dict[int, _Open] = field(default_factory=dict)  # by the identity of their sequences

    def add(self, problem: _Open) -> None:
        """A problem joins, unless it has."""
        request: Propose = problem.request
        if id(request.sequence) not in self.joined:
            self.drafting.add(request.sequence, request.boundary, request.uniforms)
            self.joined[id(request.sequence)] = problem

    def run(self) -> list[tuple[_Open, list[Candidate]]]:
        """Draw until some of the problems have their candidates."""
        problems = list(self.joined.values())
        requests = [problem.request for problem in problems]
        # Guesses are short and of one length: who leaves early only splits the pass that judges.
        share = 1.0 if requests[0].keep_distributions else _SOME
        with shared_time(requests):
            found = self.drafting.run(math.ceil(share * len(problems)))
        return [(self.joined.pop(id(sequence)), candidates) for sequence, candidates in found]


class _Schedule:
    def __init__(
        self, engine: Engine, tasks: Iterator[Task], batch_size: int, memory_budget: int | None
    ) -> None:
        self._engine = engine
        self._tasks = enumerate(tasks)
        self._batch_size, self._budget = batch_size, memory_budget
        self._waiting: tuple[int, Task, int] | None = None  # read, and found no room yet
        self._open: list[_Open] = []
        self._prefixes: dict[int, TokenSequence] = {}
        self._calls: dict[Hashable, _Call] = {}
        self._num_waits: Counter[Hashable] = Counter()  # of a kind of drawing, in a row

    def run(self) -> Iterator[Finished]:
        """Solve everything."""
        try:
            while True:
                yield from self._admit()
                if not self._open:
                    return
                yield from self._go_on()
        finally:
            for problem in self._open:
                problem.solving.close()
            for prefix in self._prefixes.values():
                prefix.close()

    def _admit(self) -> Iterator[Finished]:
        """Begin as many problems as there is room for."""
        while len(self._open) < self._batch_size:
            if self._waiting is None:
                found = next(self._tasks, None)
                if found is None:
                    return
                try:
                    self._waiting = (*found, self._most_bytes(found[1]))
                except SpecguardError as error:
                    yield Finished(found[0], error=error)
                    continue
            index, task, num_bytes = self._waiting
            taken = sum(problem.num_bytes for problem in self._open)
            if self._budget is not None and self._open and taken + num_bytes > self._budget:
                return
            self._waiting = None
            solving = self._engine.requests(task.problem, **task.changes)
            problem = _Open(index, solving, num_bytes)
            self._open.append(problem)
            yield from self._advance(problem, None)

    def _most_bytes(self, task: Task) -> int:
        """What the problem's keys and values may come to.

        Raises:
            UsageError: the budget does not hold it.
        """
        if self._budget is None:
            return 0
        config = self._engine.configured(**task.changes)
        models = [model for model in (self._engine.draft, self._engine.target) if model is not None]
        needed = sum(_most_bytes(model, task.problem, config) for model in models)
        if needed > self._budget:
            raise UsageError(
                f"the problem may take {needed} bytes of keys and values, and the budget is "
                f"{self._budget}",
                "allow more memory, or fewer tokens or candidates",
            )
        return needed

    def _go_on(self) -> Iterator[Finished]:
        """Perform the requests of as many problems as go together."""
        groups: dict[Hashable, list[_Open]] = {}
        for problem in self._open:
            groups.setdefault(problem.request.kind, []).append(problem)
        others = [group for group in groups.values() if not isinstance(group[0].request, Propose)]
        if others:
            yield from self._perform(max(others, key=len))
            return
        kind = self._kind_to_draw(groups)
        yield from self._draw(kind, groups[kind])

    def _perform(self, batch: list[_Open]) -> Iterator[Finished]:
        requests = [problem.request for problem in batch]
        try:
            for request in requests:
                if isinstance(request, Start):
                    request.prefix = self._prefix(request)
            results = perform(requests)
        except SpecguardError as reason:
            error = reason.with_traceback(None)  # which holds what the call had in its hands
        else:
            for problem, result in zip(batch, results, strict=True):
                yield from self._advance(problem, result)
            return
        if len(batch) == 1:
            yield from self._advance(batch[0], None, error)
            return
        for problem in batch:  # whose it is shows when each is alone
            yield from self._perform([problem])

    def _kind_to_draw(self, groups: dict[Hashable, list[_Open]]) -> Hashable:
        """What most problems want; the others wait until more want the same, but not for ever."""
        kind = max(groups, key=lambda kind: (self._num_waits[kind] >= _PATIENCE, len(groups[kind])))
        for other in groups:
            self._num_waits[other] += 1
        self._num_waits[kind] = 0
        return kind

    def _draw(self, kind: Hashable, batch: list[_Open]) -> Iterator[Finished]:
        """Draw steps for the problems that want this kind until some of them have theirs."""
        if not uses("joining"):
            yield from self._perform(batch)
            return
        if kind not in self._calls:
            self._calls[kind] = _Call(batch[0].request.drafting())
        call = self._calls[kind]
        for problem in batch:
            try:
                call.add(problem)
            except SpecguardError as error:
                yield from self._advance(problem, None, error)
        try:
            found = call.run() if call.joined else []
        except SpecguardError:
            found = None
        if found is None:
            del self._calls[kind], call
            yield from self._perform([problem for problem in batch if problem in self._open])
            return
        if not call.joined:
            del self._calls[kind]
        for problem, candidates in found:
            yield from self._advance(problem, candidates)

    def _advance(
        self, problem: _Open, result: Any, error: SpecguardError | None = None
    ) -> Iterator[Finished]:
        """Hand a problem its result; it goes on to its next request or to its end."""
        try:
            event = problem.solving.throw(error) if error else problem.solving.send(result)
            while isinstance(event, StepRecord):
                event = problem.solving.send(None)
            problem.wants = event
            return
        except StopIteration as stop:
            outcome = Finished(problem.index, solution=stop.value)
        except SpecguardError as reason:
            outcome = Finished(problem.index, error=reason)
        self._open.remove(problem)
        yield outcome

    def _prefix(self, start: Start) -> TokenSequence | None:
        """What prompts have in common before the problem, read once."""
        token_ids = start.prompt.token_ids[: start.prompt.problem_span[0]]
        if len(token_ids) < _SHORTEST_PREFIX:
            return None
        known = self._prefixes.get(id(start.model))
        if known is None or tuple(known.token_ids) != token_ids:
            if known is not None:
                known.close()
            known = start.model.start(Prompt(token_ids, (0, 0)))
            self._prefixes[id(start.model)] = known
        return known


def _most_bytes(model: LanguageModel[Any], problem: str, config: SolveConfig) -> int:
    prompt = model.tokenizer.encode_prompt(problem, config.system_prompt, config.thinking)
    num_held = min(len(prompt.token_ids) + config.max_tokens, model.context_limit)
    num_drafted = config.num_candidates * config.max_step_tokens if config.is_stepwise else 0
    return _BYTES_PER_BYTE * (num_held + num_drafted) * model.num_bytes_per_token

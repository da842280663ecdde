"""A model behind a server as an engine: jobs become requests, answers candidates.

Servers keep the prefixes, batch what comes at the same time and draw by a randomness of their own.
They end what they write at a text or a count; where a step ends is decided here, by the rule that
all engines have in common, and what a server has written beyond it is dropped.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Coroutine, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any, TypeVar

import numpy as np

from specguard.backends.http.client import Client
from specguard.backends.http.dialects import Continuation, Dialect, Wanted
from specguard.backends.listener import Listener
from specguard.core.engine import (
    ALL_FEATURES,
    Candidate,
    CandidateFinish,
    Feature,
    GenerateJob,
    Observation,
    ScoreJob,
    Tokenizer,
    least_logprob,
)
from specguard.core.errors import SpecguardError, UsageError
from specguard.core.text import PieceTable, StepScanner

T = TypeVar("T")

_REASON = "a server hands out tokens and their log-probabilities"
_LACKS: tuple[Feature, ...] = (
    "attention",
    "hidden states",
    "entropy",
    "distributions",
)


@dataclass(frozen=True, slots=True)
class Replica:
    """One server, and what it calls the model."""

    client: Client
    model: str


class HttpEngine:
    """An `Engine` over servers of one model. Make one with the backend's ``load``.

    A problem stays with the server that it came to first, which has its prefix.
    """

    def __init__(
        self,
        name: str,
        dialect: Dialect,
        replicas: Sequence[Replica],
        tokenizer: Tokenizer,
        context_limit: int,
    ) -> None:
        self.name, self.tokenizer, self.context_limit = name, tokenizer, context_limit
        self.reasons: dict[Feature, str] = dict.fromkeys(_LACKS, _REASON)
        self.reasons["exact randomness"] = "a server draws by a randomness of its own, from a seed"
        if dialect.why_not_scored is not None:
            self.reasons |= {"scoring": dialect.why_not_scored, "choices": dialect.why_not_scored}
        self.features: frozenset[Feature] = ALL_FEATURES - self.reasons.keys()
        self._dialect, self._replicas = dialect, tuple(replicas)
        self._places: dict[Hashable, int] = {}
        self._pieces = PieceTable(tokenizer)
        self._last_id = max(tokenizer.vocabulary.values())

    @property
    def num_bytes_per_token(self) -> int:
        """Keys and values lie elsewhere."""
        return 0

    async def generate(self, job: GenerateJob) -> list[Candidate]:
        """Sample steps, beside those of other problems."""
        self._check(job.prefix, job.boundary.max_tokens)
        if job.hidden_states or job.distributions:
            raise UsageError(f"{self.name} hands out neither hidden states nor distributions")
        replica = self._replica(job.key)
        listener = None if job.on_tokens is None else Listener(job.on_tokens)
        drawn = [_Drawn(self, job, index, listener) for index in range(job.num_candidates)]
        if self._is_whole(job):
            # Greedy ones are all the same, and vLLM refuses to draw them twice.
            count = 1 if job.sampling.is_greedy else len(drawn)
            body = self._dialect.generate_body(drawn[0].wanted(replica.model, count))
            answer = await replica.client.post(self._dialect.generate_path, body)
            continuations = self._continuations(replica, answer)
            if len(continuations) != count:
                raise SpecguardError(f"{replica.client.url} has drawn {len(continuations)} of them")
            for candidate, continuation in zip(drawn, cycle(continuations), strict=False):
                candidate.read(continuation)
        await _together(self._finish(replica, candidate) for candidate in drawn)
        if listener is not None and listener.error is not None:
            raise listener.error
        return [candidate.result() for candidate in drawn]

    async def score(self, job: ScoreJob) -> list[Observation]:
        """Observe continuations, a request for each that differs."""
        self._check(job.prefix, max(map(len, job.continuations)))
        if "scoring" in self.reasons:
            raise SpecguardError(f"{self.name} cannot verify: {self.reasons['scoring']}")
        self._check_ids([token_id for each in job.continuations for token_id in each])
        if job.capture is not None:
            raise SpecguardError(
                f"the attention of {self.name} cannot be captured: {_REASON}",
                "verify by log-probability alone: --beta 1",
            )
        if job.hidden_state or job.distributions is not None:
            raise UsageError(f"{self.name} hands out neither hidden states nor distributions")
        replica = self._replica(job.key)
        wanted = list(dict.fromkeys(job.continuations))
        found = await _together(self._observe(replica, job, each) for each in wanted)
        seen = dict(zip(wanted, found, strict=True))
        return [seen[token_ids] for token_ids in job.continuations]

    def release(self, key: Hashable) -> None:
        """The problem needs no server any more."""
        self._places.pop(key, None)

    def _is_whole(self, job: GenerateJob) -> bool:
        """Whether a job's continuations are to come at once; a stream can be left in its middle."""
        is_heard = job.on_tokens is not None or job.least_confidence > 0
        return self._dialect.has_whole_answers and not is_heard

    async def _finish(self, replica: Replica, candidate: "_Drawn") -> None:
        """Have a candidate gone on with until its step ends."""
        dialect, client = self._dialect, replica.client

        def body() -> dict[str, Any]:
            return dialect.generate_body(candidate.wanted(replica.model))

        def take(answer: Any) -> bool:
            for continuation in self._continuations(replica, answer):
                candidate.read(continuation)
            return candidate.is_finished

        while not candidate.is_finished:
            num_known = candidate.num_tokens
            if self._is_whole(candidate.job):
                take(await client.post(dialect.generate_path, body()))
            else:
                await client.stream(dialect.generate_path, body, take)
            if candidate.num_tokens == num_known:
                raise SpecguardError(f"{client.url} has ended a text without a token to end it")

    def _continuations(self, replica: Replica, answer: Any) -> list[Continuation]:
        with _understanding(replica):
            found = self._dialect.continuations(answer)
            if [len(each.token_ids) for each in found] != [len(each.logprobs) for each in found]:
                raise KeyError("logprobs")
        return found

    async def _observe(
        self, replica: Replica, job: ScoreJob, token_ids: tuple[int, ...]
    ) -> Observation:
        dialect = self._dialect
        body = dialect.score_body(replica.model, job.prefix, token_ids)
        answer = await replica.client.post(dialect.score_path, body)
        with _understanding(replica):
            scored = dialect.scored(answer, len(job.prefix), token_ids)
            if len(scored.choices) != len(token_ids) + 1:
                raise KeyError("first choices")
        return Observation(
            token_logprobs=self._finite(scored.logprobs),
            is_first_choice=np.array(scored.choices[:-1]) == np.array(token_ids),
            choices=tuple(scored.choices) if job.choices else None,
        )

    def _finite(self, logprobs: Sequence[float]) -> Any:
        found = np.array(logprobs, dtype=np.float32)
        if np.isnan(found).any():
            raise SpecguardError(f"{self.name} gives probabilities that are not finite")
        return found

    def _replica(self, key: Hashable) -> Replica:
        """The server of a problem: the one that has fewest, where it is new."""
        if key not in self._places:
            counts = Counter(self._places.values())
            self._places[key] = min(range(len(self._replicas)), key=lambda place: counts[place])
        return self._replicas[self._places[key]]

    def _check(self, prefix: Sequence[int], num_new: int) -> None:
        self._check_ids(prefix)
        wanted = len(prefix) + num_new
        if wanted > self.context_limit:
            raise SpecguardError(
                f"{wanted} tokens do not fit the context window of {self.context_limit}",
                "shorten the problem, or start the server with a longer context",
            )

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        if max(token_ids) > self._last_id:  # what it does to a server, nobody knows
            raise SpecguardError(f"{self.name} has no token {max(token_ids)}")


class _Drawn:
    """A candidate under way."""

    def __init__(
        self, engine: HttpEngine, job: GenerateJob, index: int, listener: Listener | None
    ) -> None:
        self._engine, self.job, self._index, self._listener = engine, job, index, listener
        self._scanner = StepScanner(engine._pieces, job.boundary)
        self._least = least_logprob(job)
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._finish: CandidateFinish | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the step has ended, or nobody wants to hear more."""
        is_unheard = self._listener is not None and self._listener.error is not None
        return self._finish is not None or is_unheard

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return len(self._token_ids)

    def wanted(self, model: str, count: int = 1) -> Wanted:
        """What is still to be drawn of it, or of ``count`` that have not been begun."""
        job, num_known = self.job, self.num_tokens
        return Wanted(
            model,
            [*job.prefix, *self._token_ids],
            count,
            job.boundary.max_tokens - num_known,
            job.boundary.delimiter,
            sorted(job.boundary.eos_ids),
            job.sampling,
            # A server's seed is of 32 or 64 bits, with a sign.
            (job.seed + self._index + num_known) % 2**31,
            not self._engine._is_whole(job),
        )

    def read(self, continuation: Continuation) -> None:
        """Take new tokens in, up to the end of the step."""
        self._engine._check_ids([*continuation.token_ids, 0])  # rows that pad a vocabulary
        num_known = self.num_tokens
        for token_id, logprob in zip(continuation.token_ids, continuation.logprobs, strict=True):
            if self._finish is None:
                self._token_ids.append(int(token_id))
                self._logprobs.append(math.nan if logprob is None else logprob)
                self._finish = self._scanner.feed(int(token_id))
                if self._finish is None and sum(self._logprobs) < self._least:
                    self._finish = "length"
        new = tuple(self._token_ids[num_known:])
        if self._listener is not None and new:
            self._listener.tell(self._index, new)

    def result(self) -> Candidate:
        """What was drawn."""
        assert self._finish is not None
        return Candidate(
            token_ids=tuple(self._token_ids),
            text=self._engine.tokenizer.decode(self._token_ids),
            token_logprobs=self._engine._finite(self._logprobs),
            finish=self._finish,
        )


async def _together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all; where one fails, nobody waits for the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


@contextmanager
def _understanding(replica: Replica) -> Iterator[None]:
    """What is not there, or is not what it should be, comes out as one line."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise SpecguardError(
            f"{replica.client.url} answers otherwise than its kind of server does ({said})",
            "its version may be too old or too new: see docs/engines.md for those tried",
        ) from error

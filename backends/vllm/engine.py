"""A vLLM engine behind our seam: jobs become requests, requests candidates and observations.

vLLM keeps the prefixes, batches what comes at the same time and draws by a randomness of its own.
Where a step ends is decided here, by the rule that all engines have in common.
"""

import math
import weakref
from collections.abc import Hashable, Iterable, Mapping
from itertools import chain
from typing import Any

import numpy as np

from specguard.backends.listener import Listener
from specguard.backends.vllm.attention import AttentionTap, Tapped
from specguard.backends.vllm.driver import Driver, Handle, Request
from specguard.backends.vllm.prefix import PrefixLimit
from specguard.core.engine import (
    ALL_FEATURES,
    Candidate,
    CandidateFinish,
    Feature,
    GenerateJob,
    Observation,
    Sampling,
    ScoreJob,
    Tokenizer,
    least_logprob,
)
from specguard.core.errors import SpecguardError, UsageError
from specguard.core.text import PieceTable, StepScanner

TEMPERATURES = 0.01, 2.0  # vLLM raises lower ones without an error, and refuses higher ones
_REASONS: Mapping[Feature, str] = {
    "hidden states": "vLLM hands out tokens and log-probabilities, no states",
    "entropy": "vLLM hands out the log-probabilities of single tokens",
    "distributions": "vLLM hands out the log-probabilities of single tokens",
    "exact randomness": "vLLM draws by a randomness of its own, from a seed",
}


class VLLMEngine:
    """An `Engine` over one of vLLM's. Make one with the backend's ``load``."""

    def __init__(
        self,
        name: str,
        handle: Handle,
        driver: Driver,
        tokenizer: Tokenizer,
        context_limit: int,
        tap: AttentionTap | str,
        limit: PrefixLimit | None = None,
    ) -> None:
        """``tap`` reads the attention, or says why nothing can.

        Without ``limit``, a step that lies in the cache is scored by reading its prefix anew.
        """
        self.name, self.tokenizer, self.context_limit = name, tokenizer, context_limit
        self.reasons: dict[Feature, str] = dict(_REASONS)
        self._tap: AttentionTap | None = None
        if isinstance(tap, str):
            self.reasons["attention"] = tap
        else:
            self._tap = tap
        self.features: frozenset[Feature] = ALL_FEATURES - self.reasons.keys()
        self._handle, self._limit = handle, limit
        self._pieces = PieceTable(tokenizer)
        self._last_id = max(tokenizer.vocabulary.values())
        weakref.finalize(self, driver.drop, handle).atexit = False

    @property
    def num_bytes_per_token(self) -> int:
        """Keys and values lie in a cache that was reserved when the model was loaded."""
        return 0

    async def generate(self, job: GenerateJob) -> list[Candidate]:
        """Sample steps, beside those of other problems."""
        self._check(job.prefix, job.boundary.max_tokens)
        if job.hidden_states or job.distributions:
            raise UsageError(f"{self.name} hands out neither hidden states nor distributions")
        params = _sampling_params(job.sampling)
        listener = None if job.on_tokens is None else Listener(job.on_tokens)
        drawn = [_Drawn(self, job, index, listener) for index in range(job.num_candidates)]
        requests = []
        for index, candidate in enumerate(drawn):
            own = params.clone()
            own.max_tokens = job.boundary.max_tokens
            if not job.sampling.is_greedy:
                own.seed = (job.seed + index) % 2**63
            requests.append(Request(job.prefix, own, candidate.read, _nothing, _nothing))
        await self._handle.run(requests)
        if listener is not None and listener.error is not None:
            raise listener.error
        return [candidate.result() for candidate in drawn]

    async def score(self, job: ScoreJob) -> list[Observation]:
        """Observe continuations, beside those of other problems."""
        self._check(job.prefix, max(map(len, job.continuations)))
        self._check_ids(chain.from_iterable(job.continuations))
        if job.hidden_state or job.distributions is not None:
            raise UsageError(f"{self.name} hands out neither hidden states nor distributions")
        if job.capture is not None:
            self._check_capture(job)
        seen = {token_ids: _Scored(self, job, token_ids) for token_ids in job.continuations}
        waiting = list(seen.values())
        await self._handle.run([scored.request() for scored in waiting])
        # Where the step's own blocks are in the cache, vLLM computes no rows for it.
        missing = [scored for scored in waiting if scored.observation is None]
        if missing:
            await self._handle.run([scored.request(reads_all=True) for scored in missing])
        return [seen[token_ids].result() for token_ids in job.continuations]

    def release(self, key: Hashable) -> None:
        """Nothing to do: vLLM lets go of the oldest blocks when it needs room."""

    def _check_ids(self, token_ids: Iterable[int]) -> None:
        # An id beyond the embeddings would end vLLM's engine, not the request.
        largest = max(token_ids)
        if largest > self._last_id:
            raise SpecguardError(f"{self.name} has no token {largest}")

    def _check(self, prefix: tuple[int, ...], num_new: int) -> None:
        self._check_ids(prefix)
        wanted = len(prefix) + num_new
        if wanted > self.context_limit:
            raise SpecguardError(
                f"{wanted} tokens do not fit the context window of {self.context_limit}",
                "shorten the problem; a model that can do more takes --engine-arg max_model_len=N",
            )

    def _check_capture(self, job: ScoreJob) -> None:
        if self._tap is None:
            raise SpecguardError(
                f"the attention of {self.name} cannot be captured: {self.reasons['attention']}",
                "verify by log-probability alone: --beta 1",
            )
        assert job.capture is not None
        self._tap.check(job.capture.num_layers, self.name)


class _Drawn:
    """A candidate under way."""

    def __init__(
        self, engine: VLLMEngine, job: GenerateJob, index: int, listener: Listener | None
    ) -> None:
        self._engine, self._index, self._listener = engine, index, listener
        self._scanner = StepScanner(engine._pieces, job.boundary)
        self._least = least_logprob(job)
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._finish: CandidateFinish | None = None

    def read(self, output: Any) -> bool:
        """Take new tokens in; whether the step is over."""
        [delta] = output.outputs
        entries = delta.logprobs
        num_known = len(self._token_ids)
        for token_id, start in zip(delta.token_ids, entries.start_indices, strict=True):
            if math.isnan(entries.logprobs[start]):
                raise not_finite(self._engine.name)
            self._token_ids.append(int(token_id))
            self._logprobs.append(entries.logprobs[start])
            self._finish = self._scanner.feed(int(token_id))
            if self._finish is None and sum(self._logprobs) < self._least:
                self._finish = "length"
            if self._finish is not None:
                break
        if self._listener is None:
            return self._finish is not None
        self._listener.tell(self._index, tuple(self._token_ids[num_known:]))
        return self._finish is not None or self._listener.error is not None

    def result(self) -> Candidate:
        """What was drawn."""
        if self._finish is None:
            raise _stopped(self._engine.name)
        return Candidate(
            token_ids=tuple(self._token_ids),
            text=self._engine.tokenizer.decode(self._token_ids),
            token_logprobs=np.array(self._logprobs, dtype=np.float32),
            finish=self._finish,
        )


class _Scored:
    """A continuation whose rows are awaited."""

    def __init__(self, engine: VLLMEngine, job: ScoreJob, token_ids: tuple[int, ...]) -> None:
        self._engine, self._job, self._token_ids = engine, job, token_ids
        self._name = ""  # vLLM's own
        self._tapped: Tapped | None = None
        self.observation: Observation | None = None

    def request(self, reads_all: bool = False) -> Request:
        """Ask for the rows, behind what the cache holds or from the beginning on."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0,
            max_tokens=1,
            prompt_logprobs=int(self._job.choices),
            flat_logprobs=True,
            detokenize=False,
            skip_reading_prefix_cache=reads_all,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        token_ids = self._job.prefix + self._token_ids
        return Request(token_ids, params, self._read, self._begin, self._end)

    def result(self) -> Observation:
        """What was seen."""
        if self.observation is None:
            raise _stopped(self._engine.name)
        return self.observation

    def _begin(self, name: str) -> None:
        engine, capture = self._engine, self._job.capture
        self._name = name
        if engine._limit is not None:
            engine._limit.begin(name, len(self._job.prefix) - 1)
        if capture is not None and engine._tap is not None:
            self._tapped = engine._tap.begin(name, capture, len(self._token_ids))

    def _end(self) -> None:
        engine = self._engine
        if engine._limit is not None:
            engine._limit.end(self._name)
        if self._tapped is not None and engine._tap is not None:
            engine._tap.end(self._tapped)

    def _read(self, output: Any) -> bool:
        # Rows before this one are whatever the memory held.
        if output.num_cached_tokens >= len(self._job.prefix):
            return True
        entries = output.prompt_logprobs
        starts = entries.start_indices[-len(self._token_ids) :]
        logprobs = np.array([entries.logprobs[start] for start in starts], dtype=np.float32)
        if np.isnan(logprobs).any():
            raise not_finite(self._engine.name)
        choices = None
        if self._job.choices:
            # The token itself and the first choice stand there; behind the last one, what is drawn.
            ends = entries.end_indices[-len(self._token_ids) :]
            first = [
                entries.token_ids[entries.ranks.index(1, start, end)]
                for start, end in zip(starts, ends, strict=True)
            ]
            choices = (*map(int, first), int(output.outputs[0].token_ids[0]))
        self.observation = Observation(
            token_logprobs=logprobs,
            is_first_choice=np.array([entries.ranks[start] == 1 for start in starts]),
            blocks=None if self._tapped is None else self._tapped.blocks(),
            choices=choices,
        )
        return True


def _nothing(*_: object) -> None:
    """What there is to do where no row is read."""


def not_finite(name: str) -> SpecguardError:
    """The model computes no numbers."""
    return SpecguardError(
        f"{name} gives probabilities that are not finite", "choose another --dtype: float32"
    )


def _stopped(name: str) -> SpecguardError:
    return SpecguardError(
        f"vLLM has given up a request to {name}",
        "give it a larger cache: --engine-arg kv_cache_memory_bytes=N, or gpu_memory_utilization",
    )


def _sampling_params(sampling: Sampling) -> Any:
    """How vLLM is told to draw: it looks at no stop, and hands over each token as it comes.

    Raises:
        UsageError: vLLM would draw at another temperature.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    low, high = TEMPERATURES
    if not sampling.is_greedy and not low <= sampling.temperature <= high:
        raise UsageError(
            f"vLLM draws at temperatures from {low} to {high}, not {sampling.temperature}"
        )
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=1.0 if sampling.is_greedy else sampling.top_p,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
    )

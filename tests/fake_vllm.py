"""vLLM's engine as far as the backend uses it, in plain NumPy: what it does and what it does not.

A prefix that lies in the cache gives no rows: they hold what the memory held, here a tempting zero.
A request that nobody ends goes on to its last token; what has ended stays in the cache.
"""

import sys
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from specguard.core import Sampling
from tests.reference import Llama, warp

BLOCK = 8  # tokens of the cache's blocks


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 16
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    ignore_eos: bool = False
    skip_reading_prefix_cache: bool | None = None
    output_kind: str = "cumulative"

    def clone(self) -> "SamplingParams":
        return copy(self)


@dataclass
class Flat:
    """Log-probabilities and ranks, one an entry, as vLLM lays them out."""

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)

    def append(self, *entries: tuple[int, float, int | None]) -> None:
        """Of one position, what was given or drawn first."""
        self.start_indices.append(len(self.logprobs))
        for token_id, logprob, rank in entries:
            self.token_ids.append(token_id)
            self.logprobs.append(logprob)
            self.ranks.append(rank)
        self.end_indices.append(len(self.logprobs))


@dataclass
class Sequence:
    name: str
    own: str
    token_ids: list[int]
    params: SamplingParams
    block_hashes: list[tuple[int, ...]]
    num_drawn: int = 0
    prompt_logprobs: Flat | None = None
    num_cached: int = 0
    rng: Any = None

    @property
    def request_id(self) -> str:
        return self.own


class Manager:
    """The cache: blocks, each known by all tokens up to its end."""

    def __init__(self) -> None:
        self.blocks: set[tuple[int, ...]] = set()
        self.block_pool = SimpleNamespace(hash_block_size=BLOCK)

    def get_computed_blocks(self, sequence: Sequence) -> int:
        num_cached = 0
        for block in sequence.block_hashes[: (len(sequence.token_ids) - 1) // BLOCK]:
            if block not in self.blocks:
                break
            num_cached += BLOCK
        return num_cached


def hashes(token_ids: list[int]) -> list[tuple[int, ...]]:
    return [tuple(token_ids[:end]) for end in range(BLOCK, len(token_ids) + 1, BLOCK)]


class FakeLLM:
    """One pass is a token for every request; ``num_passes`` counts, ``fails`` breaks the next."""

    def __init__(self, model: Llama, num_tokens: int) -> None:
        self.model, self.num_tokens = model, num_tokens
        self.manager = Manager()
        self.running: dict[str, Sequence] = {}
        self.num_passes = self.num_read = 0
        self.fails = self.is_closed = False
        scheduler = SimpleNamespace(kv_cache_manager=self.manager, shutdown=lambda: None)
        core = SimpleNamespace(
            scheduler=scheduler, model_executor=SimpleNamespace(shutdown=self._close)
        )
        self.engine_core = SimpleNamespace(
            engine_core=core,
            _finalizer=SimpleNamespace(detach=lambda: None),
        )

    def _close(self) -> None:
        self.is_closed = True

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def add_request(self, name: str, prompt: dict[str, Any], params: SamplingParams) -> str:
        token_ids = prompt["prompt_token_ids"]
        if max(token_ids) >= self.num_tokens:
            raise ValueError(f"Token id {max(token_ids)} is out of vocabulary\nmore of it")
        own = f"{name}-0a"
        self.running[name] = Sequence(name, own, token_ids, params, hashes(token_ids))
        self.running[name].rng = np.random.default_rng(params.seed)
        return own

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            self.running.pop(name, None)

    def step(self) -> list[Any]:
        self.num_passes += 1
        if self.fails:
            raise RuntimeError("out of memory\nhere and there")
        outputs = []
        for sequence in list(self.running.values()):
            outputs.append(self._advance(sequence))
            if outputs[-1].finished:
                del self.running[sequence.name]
        return outputs

    def _advance(self, sequence: Sequence) -> Any:
        with np.errstate(invalid="ignore"):  # a damaged model computes all the same
            return self._draw(sequence, self.model(sequence.token_ids).logits)

    def _draw(self, sequence: Sequence, logits: Any) -> Any:
        params = sequence.params
        logits = logits[:, : self.num_tokens]
        logs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        if sequence.num_drawn == 0:
            if not params.skip_reading_prefix_cache:
                sequence.num_cached = self.manager.get_computed_blocks(sequence)
            self.num_read += len(sequence.token_ids) - sequence.num_cached
            if params.prompt_logprobs is not None:
                sequence.prompt_logprobs = self._prompt(sequence, logs)
        if params.temperature == 0:
            token_id = int(logits[-1].argmax())
        else:
            probs = warp(logits[-1], Sampling(params.temperature, params.top_p))
            token_id = int(sequence.rng.choice(len(probs), p=probs))
        drawn = Flat()
        drawn.append((token_id, float(logs[-1][token_id]), None))
        self.manager.blocks.update(hashes(sequence.token_ids))
        sequence.token_ids = [*sequence.token_ids, token_id]
        sequence.num_drawn += 1
        return SimpleNamespace(
            request_id=sequence.name,
            finished=sequence.num_drawn == params.max_tokens,
            num_cached_tokens=sequence.num_cached,
            prompt_logprobs=sequence.prompt_logprobs,
            outputs=[SimpleNamespace(token_ids=[token_id], logprobs=drawn)],
        )

    def _prompt(self, sequence: Sequence, logs: Any) -> Flat:
        flat = Flat()
        flat.append()  # of the first token nothing is said
        for place, token_id in enumerate(sequence.token_ids[1:]):
            if place < sequence.num_cached:
                flat.append((token_id, 0.0, 1))
                continue
            row = logs[place]
            entries = [(token_id, float(row[token_id]), int((row >= row[token_id]).sum()))]
            if sequence.params.prompt_logprobs:
                best = int(row.argmax())
                entries.append((best, float(row[best]), 1))
            flat.append(*entries)
        return flat


def install(patch: pytest.MonkeyPatch) -> None:
    """Let `import vllm` find parameters of requests, and nothing else."""
    vllm, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vllm.SamplingParams = SamplingParams  # type: ignore[attr-defined]
    kinds = SimpleNamespace(DELTA="delta", FINAL_ONLY="final")
    params.RequestOutputKind = kinds  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "vllm", vllm)
    patch.setitem(sys.modules, "vllm.sampling_params", params)


def load(folder: Path, is_limited: bool = True) -> Any:
    """The backend's engine over a checkpoint; without attention, which is no part of this."""
    from specguard.backends.tokenizer import FolderTokenizer
    from specguard.backends.vllm.driver import driver
    from specguard.backends.vllm.engine import VLLMEngine
    from specguard.backends.vllm.prefix import make_limit

    tokenizer = FolderTokenizer(folder)
    num_tokens = max(tokenizer.vocabulary.values()) + 1
    handle = driver().make(lambda: FakeLLM(Llama.load(folder), num_tokens))
    limit = make_limit(handle.llm) if is_limited else None
    return VLLMEngine(
        str(folder), handle, driver(), tokenizer, 511, "this is no real engine", limit
    )

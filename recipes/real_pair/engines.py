"""A vLLM engine on a CPU, fed through a queue. Knows no problem and no label."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from recipes.real_pair.lines import Record

EOS_IDS = [151645, 151643]
NUCLEUS_SIZE = 256
LOG_SECONDS = 60
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # `drain` steps the engine in this process
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no helper processes: one signal stops everything
}


def log(words: str) -> None:
    """A line of progress."""
    click.echo(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {words}")


def set_environment() -> None:
    """Settings that vLLM reads when it is imported, so this comes first."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override `kv_bytes`


def use_fast_top_p() -> None:
    """Find the nucleus of top-p among the best 256 tokens.

    vLLM sorts the whole vocabulary: four fifths of a small draft's time on a CPU. The tokens kept
    are the same; a nucleus that is larger, and top-k, go vLLM's way.
    """
    import torch
    from vllm.v1.sample.ops import topk_topp_sampler

    original = topk_topp_sampler.apply_top_k_top_p

    def apply_top_k_top_p(logits: torch.Tensor, k: Any, p: torch.Tensor | None) -> Any:
        if k is not None or p is None:
            return original(logits, k, p)
        rows = (p < 1).nonzero().flatten()
        if not len(rows):
            return logits
        part = logits[rows].float()
        values, ids = part.topk(NUCLEUS_SIZE, dim=-1)
        probs = (values - part.logsumexp(dim=-1, keepdim=True)).exp()
        before = probs.cumsum(dim=-1) - probs
        limit = p[rows].unsqueeze(1)
        if bool((before[:, -1:] < limit).any()):
            return original(logits, k, p)
        values.masked_fill_(before >= limit, -float("inf"))
        kept = torch.full_like(part, -float("inf")).scatter_(1, ids, values)
        logits[rows] = kept.to(logits.dtype)
        return logits

    topk_topp_sampler.apply_top_k_top_p = apply_top_k_top_p


class Queue:
    """Requests to one model; each has a callback, which may submit more."""

    def __init__(self, role: str, folder: Path, num_rows: int, kv_bytes: int) -> None:
        from vllm import LLM

        began = time.monotonic()
        llm = LLM(
            model=str(folder),
            dtype="bfloat16",
            max_model_len=2048,
            max_num_seqs=num_rows,
            max_num_batched_tokens=2048,
            kv_cache_memory_bytes=kv_bytes,
            enable_prefix_caching=True,
            # vLLM loses a request's seed on a CPU when its prefill is cut into chunks.
            enable_chunked_prefill=False,
            distributed_executor_backend="uni",
            disable_log_stats=True,
            seed=0,
        )
        self._engine = llm.llm_engine
        self.tokenizer: Any = llm.get_tokenizer()
        self._role = role
        self._callbacks: dict[str, Callable[[Record], None]] = {}
        self._num_submitted = 0
        log(f"{role} loaded in {time.monotonic() - began:.0f} s")

    def submit(
        self,
        token_ids: Sequence[int],
        callback: Callable[[Record], None],
        max_tokens: int,
        *,
        seed: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: list[str] | None = None,
    ) -> None:
        """Ask for one output; the callback gets it during `drain`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            max_tokens=max_tokens,
            logprobs=0,
            stop=stop,
            include_stop_str_in_output=stop is not None,
            stop_token_ids=EOS_IDS,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        name = f"{self._role}-{self._num_submitted}"
        self._num_submitted += 1
        self._callbacks[name] = callback
        self._engine.add_request(name, {"prompt_token_ids": list(token_ids)}, params)

    def drain(self, what: str) -> None:
        """Work until nothing is left, callbacks' requests included."""
        num_tokens, began = 0, time.monotonic()
        noted = began
        while self._engine.has_unfinished_requests():
            for result in self._engine.step():
                if result.finished:
                    output = self._record(result.outputs[0])
                    num_tokens += len(output["token_ids"])
                    self._callbacks.pop(result.request_id)(output)
            if time.monotonic() - noted > LOG_SECONDS:
                noted = time.monotonic()
                log(f"  {what}: {len(self._callbacks)} requests left, {num_tokens} tokens")
        if num_tokens:
            log(f"  {what}: {num_tokens} tokens in {time.monotonic() - began:.0f} s")

    def _record(self, output: Any) -> Record:
        ids = [int(token) for token in output.token_ids]
        if ids and ids[-1] in EOS_IDS:
            finish = "eos"
        else:
            finish = "delimiter" if output.finish_reason == "stop" else "length"
        logprobs = zip(output.logprobs, ids, strict=True)
        return {
            "token_ids": ids,
            "text": self.tokenizer.decode(ids, skip_special_tokens=True),
            "logprobs": [round(float(entry[token].logprob), 5) for entry, token in logprobs],
            "finish": finish,
        }

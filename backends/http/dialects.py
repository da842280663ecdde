"""How servers are asked for tokens and for log-probabilities of given ones, by kind of server.

A dialect turns token ids into the body of a request, and the answer into token ids with what is
known of them. Where a step ends is decided elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from specguard.core.engine import Sampling
from specguard.core.errors import UsageError

Body = dict[str, Any]
_LOWEST_TEMPERATURE = 0.01


@dataclass(frozen=True, slots=True)
class Continuation:
    """Tokens that a server has drawn, EOS among them, with their log-probabilities."""

    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True, slots=True)
class Wanted:
    """``count`` continuations of a prefix, by the model that the server calls ``model``.

    Where ``is_streamed``, it is one, and comes token by token.
    """

    model: str
    prefix: Sequence[int]
    count: int
    max_tokens: int
    stop: str
    eos_ids: Sequence[int]
    sampling: Sampling
    seed: int
    is_streamed: bool


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probabilities of n given tokens, and the model's n + 1 first choices there and behind."""

    logprobs: list[float]
    choices: list[int]


class Dialect(Protocol):
    """One kind of server."""

    name: str
    generate_path: str
    score_path: str
    has_whole_answers: bool
    """Whether continuations come at once, several a request, where nobody listens to tokens."""
    why_not_scored: str | None
    """Why it has no log-probabilities of given tokens, None where it has."""

    def generate_body(self, wanted: Wanted) -> Body:
        """A request for continuations; the text that ends a step is to be part of them."""

    def continuations(self, answer: Any) -> list[Continuation]:
        """What has been drawn, in an answer or in one event of a stream."""

    def score_body(self, model: str, prefix: Sequence[int], token_ids: Sequence[int]) -> Body:
        """A request for log-probabilities of tokens behind a prefix."""

    def scored(self, answer: Any, num_prefix: int, token_ids: Sequence[int]) -> Scored:
        """What is said of the tokens."""


class VLLM:
    """vLLM's completions, of which `prompt_logprobs` and `return_token_ids` are its own."""

    name = "vllm"
    generate_path = score_path = "/v1/completions"
    has_whole_answers = True
    why_not_scored: str | None = None

    def generate_body(self, wanted: Wanted) -> Body:
        """Sampling as it is asked for, none of the server's own."""
        sampling = wanted.sampling
        if not sampling.is_greedy and sampling.temperature < _LOWEST_TEMPERATURE:
            raise UsageError(
                f"vLLM draws at temperatures from {_LOWEST_TEMPERATURE}, not "
                f"{sampling.temperature}: it would raise it without a word"
            )
        return {
            "model": wanted.model,
            "prompt": list(wanted.prefix),
            "n": wanted.count,
            "max_tokens": wanted.max_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0 if sampling.is_greedy else sampling.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": wanted.seed,
            "stop": [wanted.stop] if wanted.stop else [],
            "stop_token_ids": list(wanted.eos_ids),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "return_token_ids": True,
            "logprobs": 0,
            "stream": wanted.is_streamed,
        }

    def continuations(self, answer: Any) -> list[Continuation]:
        """One for each that was asked for."""
        return [
            Continuation(
                list(choice["token_ids"]),
                list(choice["logprobs"]["token_logprobs"]),
            )
            for choice in sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        ]

    def score_body(self, model: str, prefix: Sequence[int], token_ids: Sequence[int]) -> Body:
        """The whole text as a prompt."""
        return {
            "model": model,
            "prompt": [*prefix, *token_ids],
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 1,
            "return_token_ids": True,
        }

    def scored(self, answer: Any, num_prefix: int, token_ids: Sequence[int]) -> Scored:
        """Of the last tokens of the prompt."""
        [found] = answer["choices"]
        rows = found["prompt_logprobs"][num_prefix:]
        own = [row[str(token_id)] for row, token_id in zip(rows, token_ids, strict=True)]
        first = [int(name) for row in rows for name, said in row.items() if said["rank"] == 1]
        return Scored([each["logprob"] for each in own], [*first, *found["token_ids"]])


class SGLang:
    """SGLang's native interface, by its documentation; it has not been run."""

    name = "sglang"
    generate_path = score_path = "/generate"
    has_whole_answers = True
    why_not_scored: str | None = None

    def generate_body(self, wanted: Wanted) -> Body:
        """Sampling as it is asked for, none of the server's own."""
        sampling = wanted.sampling
        return {
            "input_ids": list(wanted.prefix),
            "sampling_params": {
                "n": wanted.count,
                "max_new_tokens": wanted.max_tokens,
                "temperature": sampling.temperature,
                "top_p": 1.0 if sampling.is_greedy else sampling.top_p,
                "stop": [wanted.stop] if wanted.stop else [],
                "stop_token_ids": list(wanted.eos_ids),
                "no_stop_trim": True,
                "skip_special_tokens": False,
                "sampling_seed": wanted.seed,
            },
            "return_logprob": True,
            "stream": wanted.is_streamed,
        }

    def continuations(self, answer: Any) -> list[Continuation]:
        """One for each that was asked for."""
        found = []
        for each in answer if isinstance(answer, list) else [answer]:
            rows = each["meta_info"]["output_token_logprobs"]
            found.append(Continuation([row[1] for row in rows], [row[0] for row in rows]))
        return found

    def score_body(self, model: str, prefix: Sequence[int], token_ids: Sequence[int]) -> Body:
        """The whole text as a prompt."""
        return {
            "input_ids": [*prefix, *token_ids],
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": len(prefix) - 1,
            "top_logprobs_num": 1,
        }

    def scored(self, answer: Any, num_prefix: int, token_ids: Sequence[int]) -> Scored:
        """Of the last tokens of the prompt."""
        n = len(token_ids)
        own = answer["meta_info"]["input_token_logprobs"][-n:]
        best = answer["meta_info"]["input_top_logprobs"][-n:]
        if [row[1] for row in own] != list(token_ids):
            raise KeyError("input_token_logprobs")
        first = [row[0][1] for row in best]
        return Scored([row[0] for row in own], [*first, *answer["output_ids"]])


class LlamaServer:
    """llama.cpp's server. It says nothing of tokens that it has not drawn itself.

    Where it stops at a text it says nothing of the last token either, so it is read token by token,
    and the connection closed where the step ends.
    """

    name = "llamacpp"
    generate_path, score_path = "/completion", ""
    has_whole_answers = False
    why_not_scored: str | None = (
        "llama-server hands out log-probabilities of tokens that it has drawn itself, no others"
    )

    def generate_body(self, wanted: Wanted) -> Body:
        """Sampling as it is asked for, none of the server's own."""
        sampling = wanted.sampling
        return {
            "prompt": list(wanted.prefix),
            "n_predict": wanted.max_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0 if sampling.is_greedy else sampling.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "samplers": ["top_p", "temperature"],
            "seed": wanted.seed % 2**32,
            "cache_prompt": True,
            "stream": True,
            "n_probs": 1,
            "return_tokens": True,
        }

    def continuations(self, answer: Any) -> list[Continuation]:
        """One for each that was asked for."""
        rows = answer.get("completion_probabilities", [])
        if len(rows) != len(answer["tokens"]):
            raise KeyError("completion_probabilities")
        return [Continuation([row["id"] for row in rows], [row["logprob"] for row in rows])]

    def score_body(self, model: str, prefix: Sequence[int], token_ids: Sequence[int]) -> Body:
        """The whole text as a prompt."""
        raise NotImplementedError

    def scored(self, answer: Any, num_prefix: int, token_ids: Sequence[int]) -> Scored:
        """Of the last tokens of the prompt."""
        raise NotImplementedError


DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect for dialect in (VLLM(), SGLang(), LlamaServer())
}

"""From a request to solutions under way: what is asked for, and whether it can be done.

Knows the protocol's requests, and nothing of HTTP.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from specguard.core.checks import check_problem
from specguard.core.config import SolveConfig
from specguard.core.engine import Prompt
from specguard.core.errors import SpecguardError, UsageError
from specguard.core.many import most_bytes
from specguard.core.solver import Solver
from specguard.serve.errors import ApiError
from specguard.serve.limits import Limits
from specguard.serve.options import changes_for
from specguard.serve.prompts import chat_prompt, text_prompt
from specguard.serve.schema import ChatRequest, CompletionRequest, Request
from specguard.serve.worker import Flight, Order, Worker

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Service:
    """What answers requests.

    ``name`` is what the pair is called by clients; ``check`` refuses a problem that it was not made
    for, unless ``is_forced`` or the request forces it.
    """

    solver: Solver
    worker: Worker
    limits: Limits
    name: str
    check: Callable[[str], None] | None = None
    is_forced: bool = False
    logs_prompts: bool = False
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def begin(self, request: Request) -> tuple[Flight, int]:
        """The solutions of a request, and to how many prompts.

        Raises:
            ApiError: something in the request is not possible, or there is no room.
        """
        if request.model != self.name:
            raise ApiError(
                404,
                f"there is no model {request.model!r:.80} here; there is {self.name!r}",
                param="model",
                code="model_not_found",
            )
        if request.stream_options is not None and not request.stream:
            raise ApiError(400, "stream_options need stream: true", param="stream_options")
        try:
            # One at a time, in a thread: a long prompt holds nobody up but others like it.
            async with self._lock:
                prompts = await asyncio.to_thread(self._orders, request)
        except ApiError:
            raise
        except UnicodeEncodeError as error:
            raise ApiError(400, f"the request is no valid Unicode: {error.reason}") from error
        except SpecguardError as error:
            raise ApiError.of(error) from error
        return self.worker.begin([order for orders in prompts for order in orders]), len(prompts)

    def _orders(self, request: Request) -> list[list[Order]]:
        """Of each prompt, as many as there are to be answers."""
        max_tokens = request.max_tokens
        if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
            if max_tokens not in (None, request.max_completion_tokens):
                raise UsageError("max_tokens and max_completion_tokens say different things")
            max_tokens = request.max_completion_tokens
        changes = changes_for(request, self.solver.config, max_tokens)
        config = self.solver.configured(**changes)
        self.solver.embedder(config)
        prompts = list(self._prompts(request, config))
        if len(prompts) * request.n > self.limits.choices:
            raise UsageError(f"one request may ask for {self.limits.choices} answers at most")
        if self.logs_prompts:
            for problem, _ in prompts:
                _log.info("prompt %s", json.dumps(problem))
        stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
        if not all(stop):
            raise UsageError("a stop sequence is empty")
        more: dict[str, Any] = {"stop": stop, "is_streamed": request.stream}
        if isinstance(request, ChatRequest) and request.tool_choice == "auto":
            more["tools"] = frozenset(tool.function.name for tool in request.tools)
        return [
            [
                Order(
                    problem,
                    prompt,
                    {**changes, "seed": (changes["seed"] + number) % 2**64},
                    self._num_bytes(prompt, config),
                    **more,
                )
                for number in range(request.n)
            ]
            for problem, prompt in prompts
        ]

    def _prompts(self, request: Request, config: SolveConfig) -> list[tuple[str, Prompt]]:
        tokenizer = self.solver.pair.tokenizer_for(config)
        is_checked = self.check is not None and not (self.is_forced or request.specguard.force)
        if isinstance(request, ChatRequest):
            tools = request.tools if request.tool_choice == "auto" else []
            if is_checked:
                self._check(request)
            return [self._fitting(*chat_prompt(tokenizer, request.messages, tools, config), config)]
        assert isinstance(request, CompletionRequest)
        if is_checked:
            raise UsageError(
                "these models know problems in a chat, not texts to go on with",
                "/v1/chat/completions; or try it all the same: specguard.force",
            )
        given = request.prompt
        several = isinstance(given, list) and given and not isinstance(given[0], int)
        texts: Sequence[Any] = given if several else [given]
        return [self._fitting(*text_prompt(tokenizer, text), config) for text in texts]

    def _check(self, request: ChatRequest) -> None:
        assert self.check is not None
        hint = "or try it all the same: specguard.force"
        if len(request.messages) != 1 or request.tools:
            raise UsageError("these models know single problems, and no conversation", hint)
        try:
            self.check(request.messages[0].text)
        except UsageError as error:
            raise UsageError(error.message, f"{error.hint}; {hint}") from error

    def _fitting(self, problem: str, prompt: Prompt, config: SolveConfig) -> tuple[str, Prompt]:
        check_problem(problem)
        engines = self.solver.pair.engines_for(config).values()
        limit, num_tokens = min(engine.context_limit for engine in engines), len(prompt.token_ids)
        if num_tokens >= limit:
            raise ApiError(
                400,
                f"the prompt takes {num_tokens} tokens and the context window holds {limit}",
                code="context_length_exceeded",
            )
        return problem, prompt

    def _num_bytes(self, prompt: Prompt, config: SolveConfig) -> int:
        if self.limits.memory is None:
            return 0
        needed = most_bytes(self.solver.pair, prompt, config)
        if needed > self.limits.memory:
            raise UsageError(
                f"the request may take {needed} bytes of keys and values, and the server has "
                f"{self.limits.memory}",
                "ask for fewer tokens or candidates",
            )
        return needed

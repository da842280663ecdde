"""From solutions to the protocol's answers, whole or in chunks."""

import json
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from specguard.core.config import SolveConfig
from specguard.core.records import Solution, StepRecord, step_to_dict
from specguard.serve.tools import ToolCall
from specguard.serve.worker import Outcome
from specguard.wording import label, verdict

# A text that went round in circles was cut off.
_FINISH = {
    "answer": "stop",
    "eos": "stop",
    "stop": "stop",
    "length": "length",
    "repetition": "length",
}


class Answer:
    """One answer, of a chat or of a completion."""

    def __init__(self, model: str, is_chat: bool) -> None:
        self._is_chat = is_chat
        self._kind = "chat.completion" if is_chat else "text_completion"
        prefix = "chatcmpl" if is_chat else "cmpl"
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, outcomes: Sequence[Outcome], num_prompts: int) -> dict[str, Any]:
        """All of it."""
        choices = [self._choice(number, outcome) for number, outcome in enumerate(outcomes)]
        return {
            **self._head,
            "object": self._kind,
            "choices": choices,
            "usage": usage(outcomes, num_prompts),
        }

    def chunk(
        self,
        number: int,
        delta: Mapping[str, Any] | str,
        finish_reason: str | None = None,
        own: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """A part of one choice, with what we say of it."""
        content = {"delta": delta} if self._is_chat else {"text": delta}
        choice = {"index": number, **content, "logprobs": None, "finish_reason": finish_reason}
        return self._chunk([choice if own is None else {**choice, "specguard": own}], **more)

    def usage_chunk(self, outcomes: Sequence[Outcome], num_prompts: int) -> dict[str, Any]:
        """The last one, where usage is asked for."""
        return self._chunk([], usage=usage(outcomes, num_prompts))

    def _chunk(self, choices: list[Any], **more: Any) -> dict[str, Any]:
        kind = f"{self._kind}.chunk" if self._is_chat else self._kind
        return {**self._head, "object": kind, "choices": choices, **more}

    def _choice(self, number: int, outcome: Outcome) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": number, "logprobs": None}
        if self._is_chat:
            choice["message"] = {
                "role": "assistant",
                "content": outcome.text or (None if outcome.calls else ""),
                "refusal": None,
            }
            if outcome.calls:
                choice["message"]["tool_calls"] = tool_calls(outcome.calls)
        else:
            choice["text"] = outcome.text
        return {
            **choice,
            "finish_reason": finish_reason(outcome),
            "specguard": record(outcome.solution),
        }


def finish_reason(outcome: Outcome) -> str:
    """Why it ended, in the protocol's words; the record has our own."""
    return "tool_calls" if outcome.calls else _FINISH[outcome.solution.finish_reason]


def tool_calls(calls: Sequence[ToolCall], is_delta: bool = False) -> list[dict[str, Any]]:
    """Calls of tools, each with an id of its own."""
    return [
        {
            **({"index": index} if is_delta else {}),
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for index, call in enumerate(calls)
    ]


def usage(outcomes: Sequence[Outcome], num_prompts: int) -> dict[str, int]:
    """Tokens read and written; what several choices have in common is counted once."""
    num_choices = len(outcomes) // num_prompts
    num_read = sum(each.solution.stats.num_prompt_tokens for each in outcomes[::num_choices])
    num_written = sum(outcome.num_tokens for outcome in outcomes)
    return {
        "prompt_tokens": num_read,
        "completion_tokens": num_written,
        "total_tokens": num_read + num_written,
    }


def record(solution: Solution) -> dict[str, Any]:
    """A solution's record without what the answer says anyway."""
    data = replace(solution, steps=()).to_dict()
    for name in ("config", "problem", "text"):
        del data[name]
    config = solution.config
    data["steps"] = [step_record(step, config) for step in solution.steps]
    return {**data, "method": config.method, "seed": config.seed}


def step_record(step: StepRecord, config: SolveConfig) -> dict[str, Any]:
    """A step's record, with who wrote it and why in words."""
    return {**step_to_dict(step), "label": label(step), "verdict": verdict(step, config)}


def event(data: Mapping[str, Any] | str) -> bytes:
    """A line of a stream of events."""
    return b"data: %b\n\n" % (data.encode() if isinstance(data, str) else encoded(data))


def encoded(data: Mapping[str, Any]) -> bytes:
    """As JSON, which has no infinite numbers: null stands for them."""
    try:
        return json.dumps(data, allow_nan=False).encode()
    except ValueError:
        return json.dumps(_finite(data)).encode()


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data

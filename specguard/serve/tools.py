"""Calls of tools in a text, in the forms that most open models write them.

Qwen and Hermes write ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, one or more;
Llama 3 writes nothing but ``{"name": ..., "parameters": {...}}``, and models for code the same in a
fenced block.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

OPENING = "<tool_call>"
_BARE = re.compile(r"\s*(?:```(?:json)?\s*(\{.*\})\s*```|(\{.*\}))\s*", re.DOTALL)
_BARE_BEGUN = re.compile(r"\s*(?:\{.*|`{0,2}|```(?:j|js|jso|json)?\s*(?:\{.*)?)", re.DOTALL)
_CALL = re.compile(r"<tool_call>((?:(?!<tool_call>).)*?)</tool_call>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call; ``arguments`` is a JSON object as text."""

    name: str
    arguments: str


def split_calls(text: str, tools: frozenset[str]) -> tuple[str, list[ToolCall]]:
    """A text without the calls of these tools, and the calls.

    What only looks like one stays in the text.
    """
    bare = _BARE.fullmatch(text)
    whole = _read(bare.group(1) or bare.group(2), tools) if bare else None
    if whole is not None:
        return "", [whole]
    calls: list[ToolCall] = []

    def take(match: re.Match[str]) -> str:
        call = _read(match.group(1), tools)
        if call is None:
            return match.group()
        calls.append(call)
        return ""

    rest = _CALL.sub(take, text)
    return (rest.rstrip(), calls) if calls else (text, [])


def has_call(text: str, tools: frozenset[str]) -> bool:
    """Whether a tool is called in a text."""
    return bool(tools) and bool(split_calls(text, tools)[1])


def looks_like_call(text: str) -> bool:
    """Whether a text may come to be nothing but a call."""
    return _BARE_BEGUN.fullmatch(text) is not None


def _read(text: str, tools: frozenset[str]) -> ToolCall | None:
    try:
        call: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if call["name"] not in tools or not isinstance(arguments, dict):
        return None
    return ToolCall(call["name"], json.dumps(arguments, ensure_ascii=False))

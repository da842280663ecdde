"""From a request's messages to what the models read, and the problem in it."""

import json
from collections.abc import Sequence
from typing import Any

from specguard.core.config import SolveConfig
from specguard.core.conversation import encode_conversation, encode_text
from specguard.core.engine import Prompt, Tokenizer
from specguard.core.errors import UsageError
from specguard.serve.schema import Message, Tool


def chat_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool], config: SolveConfig
) -> tuple[str, Prompt]:
    """The problem and all that is read, see `encode_conversation`.

    Raises:
        UsageError: what that refuses, or arguments of a tool call that are no JSON object.
    """
    turns = [_plain(message) for message in messages]
    without = {"function": {"strict"}}
    offered = [tool.model_dump(exclude_none=True, exclude=without) for tool in tools]
    return encode_conversation(tokenizer, turns, config, offered)


def text_prompt(tokenizer: Tokenizer, text: str | Sequence[int]) -> tuple[str, Prompt]:
    """A text to go on with, or its token ids.

    Raises:
        UsageError: nothing, or an id that is none.
    """
    if not text:
        raise UsageError("the prompt is empty")
    if not isinstance(text, str):
        known = tokenizer.vocabulary.values()
        if not all(0 <= token_id <= max(known) for token_id in text):
            raise UsageError("the prompt has token ids that the models do not know")
        return tokenizer.decode(text), Prompt(tuple(text), (0, len(text)))
    return text, encode_text(tokenizer, text)


def _plain(message: Message) -> dict[str, Any]:
    """A message as chat templates know it."""
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": message.text}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            plain[name] = value
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "type": "function",
                "id": call.id,
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return plain


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise UsageError("the arguments of a tool call must be a JSON object")
    return arguments

"""From a request's messages to what the models read, and the problem in it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from specguard.core.config import SolveConfig
from specguard.core.engine import Prompt, Tokenizer
from specguard.core.errors import UsageError
from specguard.serve.schema import Message, Tool


def chat_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool], config: SolveConfig
) -> tuple[str, Prompt]:
    """The problem, which is the last message of the user, and all that is read.

    Where a conversation has no instructions of its own, the server's stand in front of it.

    Raises:
        UsageError: a conversation that does not end with the user or a tool, or something that the
            model's template has no place for.
    """
    turns = [_plain(message) for message in messages]
    if turns[-1]["role"] not in ("user", "tool"):
        raise UsageError("the last message must be of the user or of a tool")
    asked = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    if not asked or not turns[asked[-1]]["content"].strip():
        raise UsageError("the last message of the user is empty" if asked else "no user message")
    problem = turns[asked[-1]]["content"]
    if turns[0]["role"] != "system" and config.system_prompt:
        turns.insert(0, {"role": "system", "content": config.system_prompt})
    *before, last = turns
    system = before[0]["content"] if before and before[0]["role"] == "system" else None
    if len(before) == (system is not None) and not tools and last.keys() == {"role", "content"}:
        return problem, tokenizer.encode_prompt(problem, system, config.thinking)
    plain_tools = [
        tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools
    ]
    encode_chat = getattr(tokenizer, "encode_chat", None)
    if encode_chat is None:
        return problem, _in_one(tokenizer, turns, plain_tools, config.thinking)
    prompt: Prompt = encode_chat(turns, plain_tools, config.thinking)
    return problem, prompt


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
    encode_text = getattr(tokenizer, "encode_text", None)
    if encode_text is not None:
        return text, encode_text(text)
    token_ids = tokenizer.encode(text)
    return text, Prompt(tuple(token_ids), (0, len(token_ids)))


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


def _in_one(
    tokenizer: Tokenizer,
    turns: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    thinking: bool,
) -> Prompt:
    """For a tokenizer that knows single problems only: earlier turns are told before them."""
    *before, last = turns
    if tools or last["role"] != "user":
        raise UsageError("these models' engine has no place for tools", "leave them out")
    told = "\n\n".join(
        turn["content"]
        if turn["role"] == "system"
        else f"{turn['role'].capitalize()}: {turn['content']}"
        for turn in before
    )
    return tokenizer.encode_prompt(last["content"], told, thinking)

"""Conversations: what the models read of one, and which part of it is the problem.

A turn has a "role" ("system", "user", "assistant" or "tool"), its "content", and whatever else a
chat template knows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from specguard.core.config import SolveConfig
from specguard.core.engine import Prompt, Tokenizer
from specguard.core.errors import UsageError

Turn = Mapping[str, Any]


@runtime_checkable
class ConversationTokenizer(Protocol):
    """What a tokenizer may do beyond single problems; others are told of earlier turns in one."""

    def encode_chat(
        self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]], thinking: bool
    ) -> Prompt:
        """Turns in the chat template, and the span of the last user's with what tools said since.

        Raises:
            UsageError: something that the template has no place for.
        """

    def encode_text(self, text: str) -> Prompt:
        """A text that the model is to go on with, without a template."""


def last_asked(turns: Sequence[Turn]) -> int:
    """Which turn asks what the conversation is about: the last one of the user.

    Raises:
        UsageError: there is none, or it says nothing.
    """
    asked = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    if not asked:
        raise UsageError("a conversation needs a message of the user")
    if not str(turns[asked[-1]]["content"]).strip():
        raise UsageError("the last message of the user is empty")
    return asked[-1]


def encode_conversation(
    tokenizer: Tokenizer,
    turns: Sequence[Turn],
    config: SolveConfig,
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[str, Prompt]:
    """The problem, which is the last turn of the user, and all that is read.

    Where a conversation has no instructions of its own, the system prompt of the settings stands in
    front of it.

    Raises:
        UsageError: a conversation that does not end with the user or a tool, or something that the
            model has no place for.
    """
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise UsageError("the last message must be of the user or of a tool")
    problem = str(turns[last_asked(turns)]["content"])
    if turns[0]["role"] != "system" and config.system_prompt:
        turns = [{"role": "system", "content": config.system_prompt}, *turns]
    *before, last = turns
    system = before[0]["content"] if before and before[0]["role"] == "system" else None
    if len(before) == (system is not None) and not tools and last.keys() == {"role", "content"}:
        return problem, tokenizer.encode_prompt(problem, system, config.thinking)
    if isinstance(tokenizer, ConversationTokenizer):
        return problem, tokenizer.encode_chat(turns, tools, config.thinking)
    if tools or last["role"] != "user":
        raise UsageError("the engine of these models has no place for tools", "leave them out")
    told = "\n\n".join(
        str(turn["content"])
        if turn["role"] == "system"
        else f"{str(turn['role']).capitalize()}: {turn['content']}"
        for turn in before
    )
    return problem, tokenizer.encode_prompt(problem, told, config.thinking)


def encode_text(tokenizer: Tokenizer, text: str) -> Prompt:
    """A text to go on with as it is."""
    if isinstance(tokenizer, ConversationTokenizer):
        return tokenizer.encode_text(text)
    token_ids = tokenizer.encode(text)
    return Prompt(tuple(token_ids), (0, len(token_ids)))

"""Prompts of chat models: the problem in a chat template, and where it stands there.

Whatever encodes a text and renders messages; both kinds of tokenizers are built on this.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from specguard.core.conversation import Turn, last_asked
from specguard.core.engine import Prompt
from specguard.core.errors import SpecguardError, UsageError
from specguard.core.text import END_THINK

_THINKING_SWITCH = "enable_thinking"
_STAND_IN = "\ue000problem\ue000"


class ChatTokenizer(ABC):
    """A tokenizer whose prompts go through ``chat_template`` where it is not empty."""

    chat_template: str

    @abstractmethod
    def encoded(self, text: str, is_whole: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text, and the characters [first, last) that each stands for.

        Special tokens are put around a text that ``is_whole``.
        """

    @abstractmethod
    def render(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
        """Messages in the chat template, up to where the model goes on."""

    def encode_prompt(self, problem: str, system_prompt: str | None, thinking: bool) -> Prompt:
        """The prompt's ids and the tokens of the problem, found by their character offsets.

        A system prompt that the template has no place for stands in front of the problem.

        Raises:
            UsageError: thinking is asked of a template that knows none.
        """
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        return self.encode_chat([*system, {"role": "user", "content": problem}], (), thinking)

    def encode_chat(
        self, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]], thinking: bool
    ) -> Prompt:
        """A conversation; the problem is the last turn of the user, and what tools said since.

        Raises:
            UsageError: no such turn, or something that the template has no place for.
        """
        asked = last_asked(turns)
        problem = str(turns[asked]["content"]).strip()
        options = self._options(tools, thinking)

        def rendered(content: str) -> str:
            changed = {**turns[asked], "content": content}
            return self._render([*turns[:asked], changed, *turns[asked + 1 :]], options)

        text = rendered(problem)
        # The problem's words may stand in the template too: a stand-in shows where it goes.
        start = rendered(_STAND_IN).find(_STAND_IN)
        if start < 0 or not text.startswith(problem, start):
            raise SpecguardError("the chat template changes the text of the problem")
        stop = start + len(problem)
        for turn in turns[asked + 1 :]:
            if turn["role"] == "tool" and (said := str(turn["content"]).strip()):
                stop = max(stop, text.rfind(said) + len(said))
        return self._prompt(text, start, stop)

    def encode_text(self, text: str) -> Prompt:
        """A text that the model is to go on with, as it is; all of it is the problem."""
        token_ids, _ = self.encoded(text, is_whole=True)
        return Prompt(tuple(token_ids), (0, len(token_ids)))

    def _prompt(self, text: str, start: int, stop: int) -> Prompt:
        token_ids, places = self.encoded(text, is_whole=not self.chat_template)
        inside = [
            index for index, (first, last) in enumerate(places) if first < stop and last > start
        ]
        return Prompt(tuple(token_ids), (inside[0], inside[-1] + 1))

    def _options(self, tools: Sequence[Mapping[str, Any]], thinking: bool) -> dict[str, Any]:
        template = self.chat_template
        has_switch = _THINKING_SWITCH in template
        # A template that cuts thinking out of earlier turns is of a model that always thinks.
        if thinking and not has_switch and END_THINK not in template:
            raise UsageError(
                "this model's chat template has no switch for thinking", "leave --thinking out"
            )
        if tools and "tools" not in template:
            raise UsageError("this model's chat template has no place for tools", "leave them out")
        options: dict[str, Any] = {_THINKING_SWITCH: thinking} if has_switch else {}
        return {**options, "tools": list(tools)} if tools else options

    def _render(self, turns: Sequence[Turn], options: Mapping[str, Any]) -> str:
        if not self.chat_template:
            return _transcript(turns)
        system = turns[0]["content"] if turns[0]["role"] == "system" else ""
        if system:
            try:
                text = self.render(list(map(dict, turns)), options)
            except Exception:
                text = ""
            if system.strip() in text:
                return text
            turns = _without_system(turns)
        try:
            return self.render(list(map(dict, turns)), options)
        except Exception as error:
            raise UsageError(f"the chat template refuses this prompt: {one_line(error)}") from error


def _without_system(turns: Sequence[Turn]) -> list[Turn]:
    """What the system prompt says, in front of what the user says first."""
    system, *others = turns
    first = next(index for index, turn in enumerate(others) if turn["role"] == "user")
    content = f"{system['content']}\n\n{others[first]['content']}"
    return [*others[:first], {**others[first], "content": content}, *others[first + 1 :]]


def _transcript(turns: Sequence[Turn]) -> str:
    """Without a template: the problem alone, or who said what."""
    is_single = all(turn["role"] in ("system", "user") for turn in turns)
    told = [
        str(turn["content"])
        if is_single or turn["role"] == "system"
        else f"{str(turn['role']).capitalize()}: {turn['content']}"
        for turn in turns
    ]
    return "\n\n".join([*told, "" if is_single else "Assistant:"])


def is_padding(name: str, number: int) -> bool:
    """Whether a token stands for a row that pads a vocabulary, by the name that GGUF files give."""
    return name == f"[PAD{number}]"


def one_line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__

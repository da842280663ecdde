"""Prompts of chat models: the problem in a chat template, and where it stands there.

Whatever encodes a text and renders messages; both kinds of tokenizers are built on this.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

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
    def render(self, messages: list[dict[str, str]], options: Mapping[str, Any]) -> str:
        """Messages in the chat template, up to where the model goes on."""

    def encode_prompt(self, problem: str, system_prompt: str | None, thinking: bool) -> Prompt:
        """The prompt's ids and the tokens of the problem, found by their character offsets.

        A system prompt that the template has no place for stands in front of the problem.

        Raises:
            UsageError: thinking is asked of a template that knows none.
        """
        problem = problem.strip()
        text = self._render(problem, system_prompt, thinking)
        # The problem's words may stand in the template too: a stand-in shows where it goes.
        start = self._render(_STAND_IN, system_prompt, thinking).find(_STAND_IN)
        if start < 0 or not text.startswith(problem, start):
            raise SpecguardError("the chat template changes the text of the problem")
        token_ids, places = self.encoded(text, is_whole=not self.chat_template)
        inside = [
            index
            for index, (first, last) in enumerate(places)
            if first < start + len(problem) and last > start
        ]
        return Prompt(tuple(token_ids), (inside[0], inside[-1] + 1))

    def _render(self, problem: str, system_prompt: str | None, thinking: bool) -> str:
        template = self.chat_template
        has_switch = _THINKING_SWITCH in template
        # A template that cuts thinking out of earlier turns is of a model that always thinks.
        if thinking and not has_switch and END_THINK not in template:
            raise UsageError(
                "this model's chat template has no switch for thinking", "leave --thinking out"
            )
        in_front = f"{system_prompt}\n\n{problem}" if system_prompt else problem
        if not template:
            return f"{in_front}\n\n"
        options = {_THINKING_SWITCH: thinking} if has_switch else {}
        user = {"role": "user", "content": problem}
        if system_prompt:
            try:
                text = self.render([{"role": "system", "content": system_prompt}, user], options)
            except Exception:
                text = ""
            if system_prompt.strip() in text:
                return text
            user["content"] = in_front
        try:
            return self.render([user], options)
        except Exception as error:
            raise UsageError(f"the chat template refuses this prompt: {one_line(error)}") from error


def is_padding(name: str, number: int) -> bool:
    """Whether a token stands for a row that pads a vocabulary, by the name that GGUF files give."""
    return name == f"[PAD{number}]"


def one_line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__

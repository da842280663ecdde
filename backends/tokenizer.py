"""The tokenizer of a Hugging Face folder, as the core wants it; both backends use it."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from specguard.backends.checkpoint import read_json_object
from specguard.core.engine import Prompt
from specguard.core.errors import SpecguardError, UsageError
from specguard.core.text import END_THINK

_THINKING_SWITCH = "enable_thinking"
_STAND_IN = "\ue000problem\ue000"


class FolderTokenizer:
    """Wraps ``AutoTokenizer``; prompts go through the chat template where there is one.

    Raises:
        SpecguardError: the folder has no tokenizer that can be read, or one without offsets.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        from transformers import AutoConfig, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            # It reads the config, too, which may be at fault.
            try:
                AutoConfig.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=trust_remote_code
                )
            except Exception as cause:
                needs_code = "trust_remote_code" in str(cause)
                raise SpecguardError(
                    f"{folder / 'config.json'} cannot be used: {_one_line(cause)}",
                    "a model with code of its own needs --trust-remote-code"
                    if needs_code
                    else "download or copy the file again",
                ) from error
            raise SpecguardError(
                f"the tokenizer in {folder} cannot be read: {_one_line(error)}",
                "the folder needs tokenizer.json and tokenizer_config.json",
            ) from error
        if not self._tokenizer.is_fast:
            raise SpecguardError(
                f"the tokenizer in {folder} gives no character offsets",
                "the folder needs a tokenizer.json",
            )
        self._eos_ids = frozenset(_eos_ids(folder, self._tokenizer.eos_token_id))

    @property
    def eos_ids(self) -> frozenset[int]:
        """EOS ids of the generation settings and of the tokenizer."""
        return self._eos_ids

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        """Every token's name and id."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        return vocabulary

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
        has_template = bool(self._tokenizer.chat_template)
        encoded = self._tokenizer(
            text, add_special_tokens=not has_template, return_offsets_mapping=True
        )
        inside = [
            index
            for index, (first, last) in enumerate(encoded["offset_mapping"])
            if first < start + len(problem) and last > start
        ]
        return Prompt(tuple(encoded["input_ids"]), (inside[0], inside[-1] + 1))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids without special tokens."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _render(self, problem: str, system_prompt: str | None, thinking: bool) -> str:
        template = str(self._tokenizer.chat_template or "")
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
                text = self._apply([{"role": "system", "content": system_prompt}, user], options)
            except Exception:
                text = ""
            if system_prompt.strip() in text:
                return text
            user["content"] = in_front
        try:
            return self._apply([user], options)
        except Exception as error:
            raise UsageError(
                f"the chat template refuses this prompt: {_one_line(error)}"
            ) from error

    def _apply(self, messages: list[dict[str, str]], options: Mapping[str, bool]) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **options
        )
        return text


def _eos_ids(folder: Path, tokenizer_eos: int | None) -> set[int]:
    ids = set() if tokenizer_eos is None else {tokenizer_eos}
    settings = folder / "generation_config.json"
    if settings.is_file():
        listed = read_json_object(settings).get("eos_token_id")
        ids.update(listed if isinstance(listed, list) else [] if listed is None else [listed])
    return ids


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

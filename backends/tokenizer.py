"""The tokenizer of a Hugging Face folder, as the core wants it; both backends use it."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from specguard.backends.checkpoint import read_json_object
from specguard.core.engine import Prompt
from specguard.core.errors import SpecguardError, UsageError

_THINKING_SWITCH = "enable_thinking"
_STAND_IN = "\ue000problem\ue000"


class FolderTokenizer:
    """Wraps ``AutoTokenizer``; prompts go through the chat template where there is one.

    Raises:
        SpecguardError: the folder has no tokenizer that can be read, or one without offsets.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            raise SpecguardError(
                f"the tokenizer in {folder} cannot be read: {_first_line(error)}",
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

        Raises:
            UsageError: thinking is asked of a template without that switch, or a system prompt of
                a template that has no place for it.
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
        template = self._tokenizer.chat_template
        has_switch = bool(template) and _THINKING_SWITCH in str(template)
        if thinking and not has_switch:
            raise UsageError("this model's chat template has no switch for thinking")
        if not template:
            return f"{system_prompt}\n\n{problem}\n\n" if system_prompt else f"{problem}\n\n"
        messages = [{"role": "user", "content": problem}]
        if system_prompt:
            messages.insert(0, {"role": "system", "content": system_prompt})
        options = {_THINKING_SWITCH: thinking} if has_switch else {}
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **options
            )
        except Exception as error:
            raise UsageError(
                f"the chat template refuses this prompt: {_first_line(error)}",
                "some templates have no place for a system prompt: leave it out",
            ) from error
        return text


def _eos_ids(folder: Path, tokenizer_eos: int | None) -> set[int]:
    ids = set() if tokenizer_eos is None else {tokenizer_eos}
    settings = folder / "generation_config.json"
    if settings.is_file():
        listed = read_json_object(settings).get("eos_token_id")
        ids.update(listed if isinstance(listed, list) else [] if listed is None else [listed])
    return ids


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

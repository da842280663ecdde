"""The tokenizer of a Hugging Face folder, as the core wants it; both backends use it."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from specguard.backends.chat import ChatTokenizer, is_padding, one_line
from specguard.backends.checkpoint import read_json_object
from specguard.core.errors import SpecguardError


class FolderTokenizer(ChatTokenizer):
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
                    f"{folder / 'config.json'} cannot be used: {one_line(cause)}",
                    "a model with code of its own needs --trust-remote-code"
                    if needs_code
                    else "download or copy the file again",
                ) from error
            raise SpecguardError(
                f"the tokenizer in {folder} cannot be read: {one_line(error)}",
                "the folder needs tokenizer.json and tokenizer_config.json",
            ) from error
        if not self._tokenizer.is_fast:
            raise SpecguardError(
                f"the tokenizer in {folder} gives no character offsets",
                "the folder needs a tokenizer.json",
            )
        self.chat_template = str(self._tokenizer.chat_template or "")
        self._eos_ids = frozenset(_eos_ids(folder, self._tokenizer.eos_token_id))

    @property
    def eos_ids(self) -> frozenset[int]:
        """EOS ids of the generation settings and of the tokenizer."""
        return self._eos_ids

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        """Every token's name and id."""
        return {
            name: number
            for name, number in self._tokenizer.get_vocab().items()
            if not is_padding(name, number)
        }

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

    def encoded(self, text: str, is_whole: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text, and the characters that each stands for."""
        encoded = self._tokenizer(text, add_special_tokens=is_whole, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def render(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
        """Messages in the chat template."""
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

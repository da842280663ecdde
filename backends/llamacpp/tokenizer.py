"""The tokenizer of a GGUF file: llama.cpp's own, and the chat template in the metadata.

A file may hold a whole tokenizer.json: then that one encodes, which knows more kinds.
"""

from collections.abc import Mapping, Sequence
from ctypes import create_string_buffer
from functools import cached_property
from itertools import pairwise
from typing import Any

from specguard.backends.chat import ChatTokenizer, is_padding
from specguard.backends.gguf import GGUF
from specguard.backends.llamacpp.library import library
from specguard.core.errors import SpecguardError, UsageError

_UNUSED = 1 << 1  # of a token's attributes: rows that pad a vocabulary
_MARKS = {"bos_token": "bos_token_id", "eos_token": "eos_token_id"}


class GGUFTokenizer(ChatTokenizer):
    """Encodes as llama.cpp does; prompts go through the chat template where there is one.

    Raises:
        SpecguardError: the file has no tokenizer, or a chat template that cannot be read.
    """

    def __init__(self, file: GGUF, model: Any) -> None:
        self._api, self._vocabulary, self._model = library(), model.vocabulary, model
        self._name = file.name
        if file.config.get("tokenizer.ggml.model", "no_vocab") in ("no_vocab", "none"):
            raise SpecguardError(f"{file.name} has no tokenizer", "choose a file with one")
        self._pieces: dict[int, tuple[bytes, bytes]] = {}
        self._size = int(self._api.llama_vocab_n_tokens(self._vocabulary))
        config = file.config
        self.chat_template = str(config.get("tokenizer.chat_template", ""))
        self._marks = {
            name: self.vocabulary_text(config[f"tokenizer.ggml.{key}"])
            for name, key in _MARKS.items()
            if isinstance(config.get(f"tokenizer.ggml.{key}"), int)
        }
        self._template = self._compiled()
        self._whole = _whole_tokenizer(file)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every id by which llama.cpp ends a text."""
        is_end, vocabulary = self._api.llama_vocab_is_eog, self._vocabulary
        return frozenset(number for number in range(self._size) if is_end(vocabulary, number))

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        """Every token's name and id."""
        attributes = self._api.llama_vocab_get_attr
        names = {
            number: self.vocabulary_text(number)
            for number in range(self._size)
            if not attributes(self._vocabulary, number) & _UNUSED
        }
        return {name: number for number, name in names.items() if not is_padding(name, number)}

    def vocabulary_text(self, number: int) -> str:
        """A token's name."""
        if not 0 <= number < self._size:
            raise SpecguardError(f"{self._name} names a token {number}, which it does not have")
        name: bytes = self._api.llama_vocab_get_text(self._vocabulary, number)
        return name.decode("utf-8", "replace")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        if self._whole is not None:
            ids: list[int] = self._whole.encode(text, add_special_tokens=False).ids
            return ids
        return self._ids(text, is_whole=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids without special tokens."""
        return b"".join(self._piece(number)[0] for number in token_ids).decode("utf-8", "replace")

    def encoded(self, text: str, is_whole: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and the characters that each stands for, from the bytes of its piece."""
        if self._whole is not None:
            found = self._whole.encode(text, add_special_tokens=is_whole)
            return found.ids, found.offsets
        token_ids = self._ids(text, is_whole)
        content = text.encode()
        ends = [0]
        for number in token_ids:
            piece = self._piece(number)[1]
            # What is put in front of a text (a mark, a blank) stands for none of it.
            is_there = content.startswith(piece, ends[-1])
            if not is_there and content.startswith(piece.lstrip(b" "), ends[-1]):
                piece = piece.lstrip(b" ")
                is_there = True
            ends.append(ends[-1] + len(piece) if is_there else ends[-1])
        if ends[-1] != len(content):
            raise SpecguardError(f"the tokenizer of {self._name} changes the text of the prompt")
        characters = _characters(content)
        return token_ids, [(characters[first], characters[last]) for first, last in pairwise(ends)]

    def render(self, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
        """Messages in the chat template."""
        return str(
            self._template.render(
                messages=messages, add_generation_prompt=True, **self._marks, **options
            )
        )

    def _ids(self, text: str, is_whole: bool) -> list[int]:
        content = text.encode()
        room = (self._api.llama_token * (len(content) + 4))()
        count = self._api.llama_tokenize(
            self._vocabulary, content, len(content), room, len(room), is_whole, True
        )
        if count < 0:
            raise SpecguardError(f"llama.cpp cannot encode a text for {self._name}")
        return list(room[:count])

    def _piece(self, number: int) -> tuple[bytes, bytes]:
        """A token's bytes, without and with those of special tokens."""
        if number not in self._pieces:
            self._pieces[number] = (self._bytes(number, False), self._bytes(number, True))
        return self._pieces[number]

    def _bytes(self, number: int, is_special: bool) -> bytes:
        size = 64
        while True:
            room = create_string_buffer(size)
            count = self._api.llama_token_to_piece(
                self._vocabulary, number, room, size, 0, is_special
            )
            if count >= 0:
                return room.raw[:count]
            size = -count

    def _compiled(self) -> Any:
        """The template, in a sandbox: it comes with the file."""
        from datetime import datetime

        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise UsageError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self.chat_template)
        except TemplateError as error:
            raise SpecguardError(
                f"the chat template of {self._name} cannot be read: {error}",
                "choose another file",
            ) from error


def _whole_tokenizer(file: GGUF) -> Any:
    """The tokenizer.json in the metadata, None where there is none."""
    content = file.config.get("tokenizer.huggingface.json")
    if not isinstance(content, str):
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(content)
    except Exception as error:  # the library's own kind is a plain one
        raise SpecguardError(
            f"the tokenizer.json in {file.name} cannot be read: {error}", "choose another file"
        ) from error


def _characters(content: bytes) -> list[int]:
    """How many characters have begun before each byte, and before the end."""
    counts, count = [], 0
    for byte in content:
        counts.append(count)
        count += byte & 0xC0 != 0x80
    return [*counts, count]

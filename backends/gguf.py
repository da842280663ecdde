"""GGUF files: their metadata, read and checked before any weight.

llama.cpp ends the process over some sizes that make no sense; here they are an error of one line.
Knows nothing of llama.cpp's library.
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from specguard.core.errors import SpecguardError, UsageError

SUFFIX = ".gguf"
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_MOST_ENTRIES = 2**16  # of metadata, and of tensors
_MOST_KEPT = 2**12  # numbers of a list that are kept; longer ones belong to the tokenizer
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_NUMBERS[12] = "d"
_STRING, _LIST = 8, 9
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
# What has to be there, and the largest number that makes sense.
_REQUIRED = {"block_count": 512, "context_length": 2**31 - 1, "embedding_length": 2**20}
_OPTIONAL = {
    "attention.head_count": 2**12,
    "attention.head_count_kv": 2**12,
    "attention.key_length": 2**14,
    "attention.value_length": 2**14,
    "feed_forward_length": 2**24,
    "expert_count": 2**10,
    "vocab_size": 2**24,
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's shape, fastest dimension first, and ggml's number for its type."""

    shape: tuple[int, ...]
    number_type: int


@dataclass(frozen=True)
class GGUF:
    """A model's file, or the first of its parts, whose metadata make sense.

    ``config`` are the metadata: numbers, strings, and short lists of numbers. ``num_parameters``
    counts the stored numbers, ``num_bytes`` what they take.
    """

    name: str
    weight_files: tuple[Path, ...]
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def path(self) -> Path:
        """The file, the first of its parts."""
        return self.weight_files[0]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the family."""
        return str(self.config["general.architecture"])

    def value(self, name: str, default: Any = None) -> Any:
        """Metadata of the architecture."""
        return self.config.get(f"{self.architecture}.{name}", default)

    @cached_property
    def num_bytes(self) -> int:
        """What the files take."""
        return sum(path.stat().st_size for path in self.weight_files)

    @cached_property
    def num_parameters(self) -> int:
        """Numbers in this file's tensors."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def context_limit(self) -> int:
        """Most tokens that the model was made for."""
        return int(self.value("context_length"))

    @property
    def num_cached_numbers(self) -> int:
        """Numbers that the keys and values of one token are, all layers together."""
        layers = int(self.value("block_count"))
        heads = self.value("attention.head_count", 1)
        kv_heads = self.value("attention.head_count_kv", heads)
        if isinstance(heads, list):
            heads = max(heads)
        width = int(self.value("embedding_length")) // max(1, int(heads))
        widths = sum(
            int(self.value(f"attention.{name}_length", width)) for name in ("key", "value")
        )
        total = sum(kv_heads) if isinstance(kv_heads, list) else layers * int(kv_heads)
        return total * widths


def is_gguf_path(source: str) -> bool:
    """Whether this reads as the path of a GGUF file."""
    return source.lower().endswith(SUFFIX)


def gguf_in(folder: Path) -> Path | None:
    """The GGUF file in a folder, the first of its parts; None where it is another kind of folder.

    Raises:
        UsageError: there are several.
    """
    if (folder / "config.json").is_file():
        return None
    files = sorted(file for file in folder.glob("*" + SUFFIX) if not file.name.startswith("mmproj"))
    models = [
        file for file in files if (part := _PART.search(file.name)) is None or int(part[1]) == 1
    ]
    if len(models) > 1:
        names = ", ".join(file.name for file in models)
        raise UsageError(f"{folder} has several GGUF files: {names}", f"name one: {models[0]}")
    return models[0] if models else None


def open_gguf(source: str, path: Path) -> GGUF:
    """The file at a path, its metadata checked; ``source`` is what to call it.

    Raises:
        SpecguardError: it is no GGUF file or a truncated one, a part is missing, or its numbers
            make no sense.
    """
    try:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            config, tensors = _Reader(path, content).read()
    except OSError as error:
        raise SpecguardError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # an empty file cannot be mapped
        raise _broken(path, "it is empty") from error
    found = GGUF(source, _parts(path), config, tensors)
    _check(found)
    return found


def _parts(path: Path) -> tuple[Path, ...]:
    part = _PART.search(path.name)
    if part is None:
        return (path,)
    stem, count = path.name[: part.start()], int(part[2])
    parts = [path.with_name(f"{stem}-{n:05}-of-{count:05}{SUFFIX}") for n in range(1, count + 1)]
    missing = [each.name for each in parts if not each.is_file()]
    if missing:
        raise SpecguardError(f"{path} lacks its part {missing[0]}", "download all parts")
    return tuple(parts)


def _broken(path: Path, reason: str) -> SpecguardError:
    return SpecguardError(
        f"{path} is no GGUF file that can be read: {reason}", "download or copy it again"
    )


def _check(model: GGUF) -> None:
    """Refuse what llama.cpp would stumble over."""
    path, config = model.path, model.config
    name = config.get("general.architecture")
    if not isinstance(name, str) or not name:
        raise _broken(path, "it does not say which architecture it is of")
    if config.get("general.type", "model") != "model":
        raise SpecguardError(f"{path} is no model: it is of type {config['general.type']!r}")
    for limits, is_required in (_REQUIRED, True), (_OPTIONAL, False):
        for key, most in limits.items():
            value = model.value(key)
            if value is None and not is_required:
                continue
            values = value if isinstance(value, list) else [value]
            lowest = 1 if is_required else 0
            if not all(isinstance(each, int) and lowest <= each <= most for each in values):
                raise _broken(path, f"{name}.{key} is {value!r}")
    if not model.tensors:
        raise _broken(path, "it has no weights")


class _Reader:
    """Reads a file from its beginning; nothing is taken at its word."""

    def __init__(self, path: Path, content: mmap) -> None:
        self._path, self._content, self._place = path, content, 0

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self._content[:4] != _MAGIC:
            raise _broken(self._path, "it does not begin as one")
        self._place = 4
        version = self._number(4)
        if version not in _VERSIONS:
            raise _broken(self._path, f"its version is {version}")
        num_tensors, num_entries = self._number(10), self._number(10)
        for count, what in (num_tensors, "tensors"), (num_entries, "metadata"):
            if count > _MOST_ENTRIES:
                raise _broken(self._path, f"it would have {count} {what}")
        config: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self._string()
            value = self._value(self._number(4))
            if value is not None:
                config[key] = value
        tensors, offsets = {}, [0]
        for _ in range(num_tensors):
            name = self._string()
            num_dims = self._number(4)
            if num_dims > 4:
                raise _broken(self._path, f"the tensor {name!r} has {num_dims} dimensions")
            shape = tuple(self._number(10) for _ in range(num_dims))
            tensors[name] = Tensor(shape, self._number(4))
            offsets.append(self._number(10))
        if self._place + max(offsets) > len(self._content):
            raise self._cut_short()
        return config, tensors

    def _value(self, kind: int) -> Any:
        """A value, None for one that is passed over."""
        if kind in _NUMBERS:
            return self._number(kind)
        if kind == _STRING:
            return self._string()
        if kind != _LIST:
            raise _broken(self._path, f"it has metadata of an unknown type, {kind}")
        kind, length = self._number(4), self._number(10)
        if kind in _NUMBERS:
            size = struct.calcsize("<" + _NUMBERS[kind])
            start = self._take(length * size)
            if length > _MOST_KEPT:
                return None
            return list(struct.unpack_from(f"<{length}{_NUMBERS[kind]}", self._content, start))
        if kind != _STRING:
            raise _broken(self._path, f"it has lists of an unknown type, {kind}")
        self._pass_strings(length)
        return None

    def _pass_strings(self, count: int) -> None:
        """A tokenizer has hundreds of thousands."""
        read, content, place = struct.Struct("<Q").unpack_from, self._content, self._place
        last = len(content) - 8
        for _ in range(count):
            if place > last:
                raise self._cut_short()
            place += 8 + read(content, place)[0]
        self._place = place
        self._take(0)

    def _number(self, kind: int) -> Any:
        form = "<" + _NUMBERS[kind]
        return struct.unpack_from(form, self._content, self._take(struct.calcsize(form)))[0]

    def _string(self) -> str:
        length = self._number(10)
        start = self._take(length)
        return self._content[start : start + length].decode("utf-8", "replace")

    def _take(self, num_bytes: int) -> int:
        """Where the next bytes begin, which have to be there."""
        start = self._place
        if num_bytes > len(self._content) - start:  # less than nothing may be left
            raise self._cut_short()
        self._place = start + num_bytes
        return start

    def _cut_short(self) -> SpecguardError:
        return _broken(self._path, "it ends too early")

"""Model folders: found by path or hub id, their files checked before anything is loaded."""

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from specguard.backends.gguf import GGUF, gguf_in, is_gguf_path, open_gguf
from specguard.core.errors import SpecguardError, UsageError

PACKED = "int4"  # what weights rounded to 4 bits are called as a number type
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_COUNTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "vocab_size",
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose config and safetensors weights are there and whole.

    ``num_parameters`` counts the stored numbers, ``num_bytes`` what they take.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    num_parameters: int
    num_bytes: int
    weight_files: tuple[Path, ...] = ()

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the config."""
        part = self.config.get("text_config")
        return part if isinstance(part, dict) else self.config

    @property
    def model_type(self) -> str:
        """Architecture family, as the config names it."""
        return str(self.config.get("model_type", "unknown"))

    @property
    def number_type(self) -> str:
        """What the weights are numbers of, as the config says: ``bfloat16``, ``float32``, ..."""
        name = self.text_config.get("dtype") or self.text_config.get("torch_dtype")
        return str(name or self.config.get("dtype") or self.config.get("torch_dtype") or "")

    @property
    def is_reward_model(self) -> bool:
        """Whether it scores steps in place of predicting tokens."""
        names = self.config.get("architectures") or []
        return any(str(name).endswith("ForProcessRewardModel") for name in names)

    def check_head(self, is_headless: bool) -> None:
        """Refuse a model without a language head where one is needed.

        Raises:
            SpecguardError: it is a process reward model.
        """
        if self.is_reward_model and not is_headless:
            raise SpecguardError(
                f"{self.name} is a process reward model: it judges steps and writes none",
                "give it as the reward model, and another one as draft or target",
            )

    @property
    def context_limit(self) -> int:
        """Most tokens that the model was made for."""
        limit = self.text_config.get("max_position_embeddings")
        return int(limit) if limit else 2**31

    @property
    def num_cached_numbers(self) -> int:
        """Numbers that the keys and values of one token are, all layers together."""
        config = self.text_config
        heads = int(config.get("num_attention_heads") or 0)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        dim = config.get("head_dim") or (int(config.get("hidden_size") or 0) // max(1, heads))
        return 2 * int(config.get("num_hidden_layers") or 0) * kv_heads * int(dim)

    @property
    def capture_refusal(self) -> str | None:
        """Why the columns of its attention are not all of the sequence's positions, or None."""
        config = self.text_config
        if config.get("attn_logit_softcapping"):
            return f"{self.model_type} soft-caps its attention scores"
        layer_types = config.get("layer_types")
        if isinstance(layer_types, list):
            slides = "sliding_attention" in layer_types
        else:
            window = config.get("sliding_window")
            is_switched_off = config.get("use_sliding_window") is False
            slides = not is_switched_off and 0 < int(window or 0) < self.context_limit
        return f"{self.model_type} has sliding-window layers" if slides else None


def open_checkpoint(source: str) -> Checkpoint:
    """The checkpoint at a local folder, or of a hub id (``owner/name[@revision]``) on this disk.

    Never uses the network.

    Raises:
        SpecguardError: no such folder, not downloaded yet, or config or weights missing, truncated
            or corrupt.
    """
    if is_gguf(source):
        raise SpecguardError(
            f"{source} is a GGUF file, and this backend reads folders", "choose --backend llamacpp"
        )
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _cached_snapshot(source)
    config = _read_config(folder)
    files = _weight_files(folder)
    return Checkpoint(
        source,
        folder,
        config,
        num_parameters=sum(map(_count_numbers, files)),
        num_bytes=sum(path.stat().st_size for path in files),
        weight_files=tuple(files),
    )


def open_model(source: str) -> Checkpoint | GGUF:
    """The checkpoint or the GGUF file that a source leads to.

    Raises:
        SpecguardError: as of `open_checkpoint` and `read_gguf`.
    """
    return read_gguf(source) if is_gguf(source) else open_checkpoint(source)


def is_gguf(source: str) -> bool:
    """Whether a source is a GGUF file, there or not, or a folder or a hub repo with one.

    Raises:
        UsageError: there are several.
    """
    if is_url(source):
        return False
    path = Path(source).expanduser()
    if is_gguf_path(source) and not path.is_dir():
        return True
    return _gguf_in(source) is not None


def _gguf_in(source: str) -> Path | None:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return gguf_in(folder)
    if not is_hub_id(source):
        return None
    try:
        return gguf_in(_cached_snapshot(source))
    except UsageError:
        raise
    except SpecguardError:  # nothing is on this disk
        return None


def read_gguf(source: str) -> GGUF:
    """The GGUF file of a source, its metadata checked.

    Raises:
        SpecguardError: there is none, it is no GGUF file or a truncated one, a part is missing, or
            its numbers make no sense.
    """
    path = Path(source).expanduser()
    found = path if path.is_file() else _gguf_in(source)
    if found is None:
        raise SpecguardError(
            f"there is no GGUF file {source!r}", "give a file, or a folder or hub repo with one"
        )
    return open_gguf(source, found)


def is_url(source: str) -> bool:
    """Whether a model is behind a server, or several with commas between."""
    return source.lower().startswith(("http://", "https://"))


def is_hub_id(source: str) -> bool:
    """Whether this reads as the id of a model on the hub, and is no path here."""
    is_path = (
        is_url(source) or source.startswith((".", "/", "~")) or Path(source).expanduser().is_dir()
    )
    is_path = is_path or is_gguf_path(source)
    return not is_path and _HUB_ID.fullmatch(source) is not None


def is_on_disk(source: str) -> bool:
    """Whether `open_model` would find weights."""
    if is_url(source):
        return False
    folder = Path(source).expanduser()
    try:
        if is_gguf(source):
            return not is_gguf_path(source) or folder.is_file()
        _weight_files(folder if folder.is_dir() else _cached_snapshot(source))
    except SpecguardError:
        return False
    return True


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        SpecguardError: unreadable, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecguardError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SpecguardError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise SpecguardError(f"{path} is not a JSON object")
    return content


def split_revision(hub_id: str) -> tuple[str, str | None]:
    """``owner/name@revision`` as name and revision."""
    name, _, revision = hub_id.partition("@")
    return name, revision or None


def _cached_snapshot(source: str) -> Path:
    if not is_hub_id(source):
        raise SpecguardError(
            f"there is no model folder {source!r}",
            "give a folder with config.json and safetensors, or a hub id like owner/name",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, revision = split_revision(source)
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except HFValidationError as error:
        raise UsageError(f"{source!r} is no hub id: {error}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise SpecguardError(
            f"{source} is neither a folder nor a model on this disk",
            f"download it first: specguard models pull {source}",
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise SpecguardError(
            f"{folder} has no config.json", "give the folder of a Hugging Face checkpoint"
        )
    config = read_json_object(path)
    text_config = config.get("text_config")
    _check_counts(path, config)
    if isinstance(text_config, dict):
        _check_counts(path, text_config)
    return config


def _check_counts(path: Path, config: dict[str, Any]) -> None:
    for name in _COUNTS:
        value = config.get(name)
        if value is not None and not (isinstance(value, (int, float)) and value >= 1):
            raise SpecguardError(
                f"{path}: {name} is {value!r}, and should be a number from 1 on",
                "download or copy the file again",
            )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            raise SpecguardError(f"{index} is no index of weights")
        names = set(weight_map.values())
        paths = [folder / name for name in sorted(names)]
    else:
        paths = [folder / "model.safetensors"]
    for path in paths:
        if not path.is_file():
            raise SpecguardError(
                f"{folder} has no {path.name}",
                "weights must be safetensors; a download may be incomplete",
            )
    return paths


def _count_numbers(path: Path) -> int:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise SpecguardError(
            f"the weights {path} are truncated or corrupt: {error}", "download or copy them again"
        ) from error
    return sum(map(prod, shapes))

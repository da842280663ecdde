"""Model folders: found by path or hub id, their files checked before anything is loaded."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specguard.core.errors import SpecguardError, UsageError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose config and safetensors weights are there and whole.

    ``num_parameters`` counts stored numbers, ``num_bytes`` their size as stored.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    num_parameters: int
    num_bytes: int

    @property
    def model_type(self) -> str:
        """Architecture family, as the config names it."""
        return str(self.config.get("model_type", "unknown"))


def open_checkpoint(source: str) -> Checkpoint:
    """The checkpoint at a local folder, or of a hub id (``owner/name[@revision]``) on this disk.

    Never uses the network.

    Raises:
        UsageError: neither an existing folder nor the form of a hub id.
        SpecguardError: not downloaded yet; config or weights missing, truncated or corrupt.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _cached_snapshot(source)
    config = _read_config(folder)
    num_parameters = num_bytes = 0
    for path in _weight_files(folder):
        for dtype, size in _tensor_sizes(path):
            num_parameters += size
            num_bytes += size * _ITEM_BYTES.get(dtype, 1)
    return Checkpoint(source, folder, config, num_parameters, num_bytes)


def is_on_disk(source: str) -> bool:
    """Whether `open_checkpoint` would find a folder with weights."""
    try:
        _weight_files(
            Path(source) if Path(source).expanduser().is_dir() else _cached_snapshot(source)
        )
    except SpecguardError:
        return False
    return True


def split_revision(hub_id: str) -> tuple[str, str | None]:
    """``owner/name@revision`` as name and revision."""
    name, _, revision = hub_id.partition("@")
    return name, revision or None


def _cached_snapshot(source: str) -> Path:
    if not _HUB_ID.fullmatch(source) or source.startswith((".", "/", "~")):
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
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SpecguardError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise SpecguardError(f"{path} is not a JSON object")
    return config


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise SpecguardError(f"{index} is no index of weights") from error
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


def _tensor_sizes(path: Path) -> list[tuple[str, int]]:
    from safetensors import SafetensorError, safe_open

    sizes = []
    try:
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                entry = file.get_slice(key)
                size = 1
                for length in entry.get_shape():
                    size *= length
                sizes.append((entry.get_dtype(), size))
    except (SafetensorError, OSError) as error:
        raise SpecguardError(
            f"the weights {path} are truncated or corrupt: {error}", "download or copy them again"
        ) from error
    return sizes

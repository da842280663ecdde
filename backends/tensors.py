"""Single tensors of a checkpoint as NumPy arrays, read without a framework."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specguard.backends.checkpoint import Checkpoint

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read_tensors(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, NDArray[np.float32]]:
    """Those of the named tensors that the checkpoint holds as floating-point numbers, in float32.

    Headers were checked when the checkpoint was opened.
    """
    found = {}
    for path in checkpoint.weight_files:
        header, start = _header(path)
        for name in header.keys() & set(names):
            if header[name]["dtype"] in _DTYPES:
                found[name] = _read(path, header[name], start)
    return found


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where their bytes begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return header, 8 + length


def _read(path: Path, entry: dict[str, Any], start: int) -> NDArray[np.float32]:
    first, last = entry["data_offsets"]
    with path.open("rb") as file:
        file.seek(start + first)
        values = np.frombuffer(file.read(last - first), _DTYPES[entry["dtype"]])
    if entry["dtype"] == "BF16":
        # The upper half of a float32.
        return (values.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])
    return values.astype(np.float32).reshape(entry["shape"])

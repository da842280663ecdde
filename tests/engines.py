"""Engines over a checkpoint, as the contract and the tests of the local driver want them."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from specguard.backends.local.engine import LocalEngine
from specguard.core import Engine
from tests import fake_llama
from tests.reference import ReferenceEngine

LOCAL_ENGINES = ("torch", "torch, late", "torch, fixed", "mlx", "fake llamacpp", "llamacpp")


def load(name: str, folder: Path) -> Engine:
    """An engine by name: "torch, late" reads tokens as GPUs do, "torch, fixed" has their passes."""
    if name.startswith("reference"):
        return ReferenceEngine.load(folder)
    return load_local(name, folder)


def load_local(name: str, folder: Path) -> LocalEngine:
    if name.startswith("mlx"):
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
        from specguard.backends.mlx.loading import load_model as load_mlx

        return load_mlx(str(folder))
    if name.startswith("llamacpp"):
        return load_gguf(folder)
    if name.startswith("fake llamacpp"):
        return fake_llama.load(folder)
    from specguard.backends.pytorch.layer import TorchLayer
    from specguard.backends.pytorch.loading import load_model

    engine = load_model(str(folder))
    if name.endswith(("late", "fixed")):
        engine.layer.reads_late = True  # type: ignore[misc]
    if name.endswith("fixed"):
        assert isinstance(engine.layer, TorchLayer)
        engine.layer.fix_shapes()
    return engine


def load_gguf(folder: Path, **arguments: str) -> LocalEngine:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from specguard.backends.llamacpp.loading import load_model

    engine = load_model(str(gguf_of(folder)), "auto", {"n_threads": "1", **arguments})
    # llama.cpp ends by <|endoftext|>, too, which random weights draw now and then.
    engine.tokenizer.eos_ids = frozenset({2})  # type: ignore[misc]
    return engine


def gguf_of(folder: Path) -> Path:
    """A checkpoint as a GGUF file, in float32, written once."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    from recipes.gguf import write

    path = Path(_files.name) / f"{len(_written)}.gguf"
    return _written.get(folder) or _written.setdefault(folder, write(folder, path))


_files = TemporaryDirectory()
_written: dict[Path, Path] = {}


def over(layer: Any, engine: LocalEngine) -> LocalEngine:
    """An engine like another one, with nothing kept, over a layer."""
    return LocalEngine(engine.name, layer, engine.tokenizer, engine.context_limit)


def fresh(engine: LocalEngine) -> LocalEngine:
    """The same model, with nothing kept."""
    return over(engine.layer, engine)


class WatchedLayer:
    """A layer that counts: ``passes`` are the rows of each pass.

    ``watch`` is called with the token ids before a pass, and may raise.
    """

    def __init__(self, layer: Any, watch: Callable[[list[int]], None] | None = None) -> None:
        self._layer, self._watch = layer, watch
        self.passes: list[int] = []
        self.num_tokens = 0

    def forward(self, rows: Any, token_ids: Any, *rest: Any) -> Any:
        if self._watch is not None:
            self._watch(token_ids.tolist() if hasattr(token_ids, "tolist") else list(token_ids))
        self.passes.append(len(rows))
        self.num_tokens += len(token_ids)
        return self._layer.forward(rows, token_ids, *rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def spoil_new_memory(patch: pytest.MonkeyPatch) -> None:
    """Columns that nobody has written hold what memory holds: anything, so here the worst."""
    from specguard.backends.pytorch.kv import KVBuffer
    from specguard.backends.pytorch.slots import Slot, SlotPool

    allocate = KVBuffer._allocate

    def spoiled(self: KVBuffer, *arguments: Any) -> None:
        allocate(self, *arguments)
        assert self.data is not None
        self.data.fill_(float("nan"))

    patch.setattr(KVBuffer, "_allocate", spoiled)
    # But for slots, which promise numbers.
    zeros = SlotPool._zeros
    patch.setattr(SlotPool, "_zeros", lambda *arguments: zeros(*arguments) + 100)

    def clear(self: Slot) -> None:
        assert self.data is not None
        self.data.fill_(100)

    patch.setattr(Slot, "clear", clear)

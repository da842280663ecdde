"""The engines that the contract is run over; all have the weights of the same checkpoint."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from specguard.core import Engine
from specguard.core.reference import VARIABLE
from tests.engines import load, spoil_new_memory
from tests.reference import ReferenceEngine

# "plain" is with the reference switch on.
ENGINES = (
    "reference",
    "torch",
    "torch, late",
    "torch, fixed",
    "torch, plain",
    "mlx",
    "mlx, plain",
    "fake llamacpp",
    "llamacpp",
)


@pytest.fixture(scope="module", params=ENGINES)
def loader(request: pytest.FixtureRequest) -> Iterator[Callable[[Path], Engine]]:
    """Loads a checkpoint as the engine in hand."""
    name = request.param
    with pytest.MonkeyPatch.context() as patch:
        if name.endswith("plain"):
            patch.setenv(VARIABLE, "1")
        if name.startswith("torch"):
            spoil_new_memory(patch)
        yield lambda folder: load(name, folder)


@pytest.fixture(scope="module")
def engine(loader: Callable[[Path], Engine], checkpoint: Path) -> Engine:
    return loader(checkpoint)


@pytest.fixture(scope="module")
def draft(loader: Callable[[Path], Engine], draft_checkpoint: Path) -> Engine:
    """A smaller model, with a padded vocabulary."""
    return loader(draft_checkpoint)


@pytest.fixture(scope="session")
def plain(checkpoint: Path) -> ReferenceEngine:
    """What the engine in hand must come to."""
    return ReferenceEngine.load(checkpoint)

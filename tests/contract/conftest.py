"""The models that the contract is run over, with and without shortcuts."""

from collections.abc import Callable, Iterator

import pytest

from specguard.core.shortcuts import VARIABLE
from tests.contract.calls import Model


def load_reference(request: pytest.FixtureRequest, role: str) -> Model:
    from tests.reference import ReferenceModel

    return ReferenceModel(seed=1 if role == "target" else 2)


def load_torch(request: pytest.FixtureRequest, role: str) -> Model:
    from specguard.backends.pytorch.loading import load_model

    name = "checkpoint" if role == "target" else "draft_checkpoint"
    return load_model(str(request.getfixturevalue(name)))


def load_mlx(request: pytest.FixtureRequest, role: str) -> Model:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    from specguard.backends.mlx.loading import load_model

    name = "checkpoint" if role == "target" else "draft_checkpoint"
    return load_model(str(request.getfixturevalue(name)))


LOADERS: dict[str, Callable[[pytest.FixtureRequest, str], Model]] = {
    "reference": load_reference,
    "torch": load_torch,
    "mlx": load_mlx,
}


@pytest.fixture(scope="module", params=[*LOADERS, "torch, no shortcuts", "mlx, no shortcuts"])
def loader(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Model]]:
    name, *plain = request.param.split(", ")
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setenv(VARIABLE, "all")
        yield lambda role: LOADERS[name](request, role)


@pytest.fixture(scope="module")
def model(loader: Callable[[str], Model]) -> Model:
    return loader("target")


@pytest.fixture(scope="module")
def draft(loader: Callable[[str], Model]) -> Model:
    return loader("draft")

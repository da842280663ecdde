"""Backends and pairs of third parties, registered by entry points."""

from importlib.metadata import EntryPoint

import pytest

from specguard.backends import registry
from specguard.backends.pytorch.backend import TorchBackend
from specguard.core import SpecguardError, UsageError
from specguard.models import pairs


def test_a_third_party_s_backend_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint(
        "abacus", "specguard.backends.pytorch.backend:CPU", registry.ENTRY_POINT_GROUP
    )
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    assert "abacus" in registry.backend_names()
    name, backend, device = registry.choose_backend("abacus")
    assert (name, device) == ("abacus", None)
    assert isinstance(backend, TorchBackend)
    with pytest.raises(UsageError, match="no backend is called 'abacuss'") as caught:
        registry.choose_backend("abacuss")
    assert "did you mean 'abacus'" in caught.value.hint


def test_a_third_party_s_pair_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_mine", pairs.PAIRS["tiny"], raising=False)
    entry = EntryPoint("mine", "specguard.models.pairs:_mine", pairs.ENTRY_POINT_GROUP)
    monkeypatch.setattr(pairs, "entry_points", lambda group: [entry])
    assert "mine" in pairs.pair_names()
    assert pairs.find_pair("mine") is pairs.PAIRS["tiny"]


def test_a_device_number_goes_to_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = registry.BackendStatus("cuda", True)
    monkeypatch.setattr(TorchBackend, "status", lambda self: usable)
    assert registry.choose_backend("cuda:1")[2] == "cuda:1"
    assert registry.choose_backend("auto")[0] == "cuda"


@pytest.mark.parametrize(
    ("system", "usable", "expected"),
    [
        ("Darwin", {"mlx", "cpu"}, "mlx"),
        ("Darwin", {"cpu"}, "cpu"),
        ("Linux", {"cuda", "cpu", "mlx"}, "cuda"),
        ("Linux", {"cpu", "mlx"}, "cpu"),
        ("Linux", {"mlx"}, "mlx"),
        ("Linux", set(), None),
    ],
)
def test_auto_takes_what_suits_the_machine(
    system: str, usable: set[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.platform, "system", lambda: system)
    monkeypatch.setattr(registry.platform, "machine", lambda: "arm64")

    class Known:
        def __init__(self, name: str) -> None:
            self.name = name

        def status(self) -> registry.BackendStatus:
            return registry.BackendStatus(self.name, self.name in usable, reason="not here")

    monkeypatch.setattr(registry, "find_backend", Known)
    assert registry.automatic_backend() == expected
    if expected is None:
        with pytest.raises(SpecguardError, match="backend 'cpu' cannot be used: not here"):
            registry.choose_backend("auto")
    else:
        assert registry.choose_backend("auto")[0] == expected

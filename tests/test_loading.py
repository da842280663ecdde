"""Which pair is loaded, and with which settings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import specguard
from specguard.backends.local.engine import LocalEngine
from specguard.backends.pytorch.backend import TorchBackend
from specguard.backends.pytorch.loading import load_model
from specguard.backends.registry import BackendStatus
from specguard.core import Pair, SolveConfig
from specguard.loading import choose, configure
from specguard.models import pairs
from specguard.models.settings import choose_pair
from tests.conftest import TINY


def test_a_replaced_model_keeps_the_pair_s_settings_but_its_bounds() -> None:
    choice = choose("tiny", "cpu", draft="/some/draft")
    assert choice.pair is not None
    own = pairs.PAIRS["tiny"]
    assert (choice.draft, choice.target) == ("/some/draft", own.target["torch"])
    config = configure(choice)
    assert config.num_candidates == own.num_candidates
    assert not config.verifier.bounds
    assert not config.verifier.is_calibrated
    math = configure(choose("qwen2.5-math", "cpu", target="/some/target"))
    assert "boxed" in (math.system_prompt or "")


def test_the_default_is_the_user_s_pair_then_one_on_disk_then_the_built_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choice = choose(None, "cpu")
    assert choice.is_fallback
    assert choice.pair is pairs.PAIRS["tiny"]
    monkeypatch.setattr(pairs, "is_on_disk", lambda source: "Qwen2.5-Math" in source)
    choice = choose(None, "cpu")
    assert choice.pair is pairs.PAIRS["qwen2.5-math"]
    assert not choice.is_fallback
    choose_pair("llama3")
    assert choose(None, "cpu").pair is pairs.PAIRS["llama3"]


def test_half_a_pair_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(specguard.UsageError, match="go together"):
        specguard.load(draft=str(TINY / "draft"), progress=lambda _: pytest.fail("loaded"))
    with pytest.raises(specguard.UsageError, match="no setting is called 'kandidates'"):
        specguard.load(kandidates=3)


def test_a_plain_method_loads_its_own_model_only() -> None:
    loaded: list[str] = []
    solver = specguard.load("tiny", method="target", progress=loaded.append)
    assert [Path(name).resolve() for name in loaded] == [TINY / "target"]
    assert solver.draft is None


def test_each_model_comes_with_the_weights_of_its_backend() -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    choice = choose("qwen2.5", "cpu", draft_backend="mlx")
    own = pairs.PAIRS["qwen2.5"]
    assert (choice.draft, choice.target) == (own.draft["mlx"], own.target["torch"])
    assert choice.backends == {"draft": "mlx", "target": "cpu"}
    assert choice.backend == "cpu, draft mlx"
    assert choose("qwen2.5", "cpu", draft_backend="cpu").backend == "cpu"


def test_two_devices_of_one_backend_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = BackendStatus("cuda", True)
    monkeypatch.setattr(TorchBackend, "status", lambda self: usable)
    choice = choose("tiny", "cuda:0", draft_backend="cuda:1")
    assert choice.backends == {"draft": "cuda:1", "target": "cuda:0"}


def test_what_the_user_should_know_of_the_engines_is_noted_once(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(checkpoint)
    same = "draft and target are the same model: there is nothing to gain"
    assert specguard.load(draft=folder, target=folder, backend="cpu").notes == [same]

    def noted(*arguments: Any, **options: Any) -> LocalEngine:
        engine = load_model(folder)
        engine.note = "it limps"
        return engine

    monkeypatch.setattr(TorchBackend, "load", noted)
    notes = specguard.load(draft=folder, target=folder, backend="cpu").notes
    assert sorted(notes) == [same, "it limps"]


def test_parts_of_the_verifier_are_changed_and_the_others_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[set[str]] = []

    def degraded(self: Pair, config: SolveConfig, parts: set[str]) -> tuple[SolveConfig, list[str]]:
        chosen.append(parts)
        return config, []

    monkeypatch.setattr(Pair, "degraded", degraded)
    own = pairs.PAIRS["tiny"].verifier
    config = specguard.load("tiny", verifier={"threshold": 0.9}, seed=3).config
    assert config.verifier == replace(own, threshold=0.9)
    asking = specguard.load("tiny", selector="draft", verifier={"model": "draft"}).config
    assert asking.verifier == own.asking("draft")
    specguard.load("tiny", verifier={"weights": {"log_prob": 1.0}})
    specguard.load("tiny", verifier=own)
    assert [parts & {"weights", "threshold", "selector"} for parts in chosen] == [
        {"threshold"},
        {"selector"},
        {"weights"},
        {"weights"},
    ]
    with pytest.raises(specguard.UsageError, match="no setting of a verifier is called 'treshold'"):
        specguard.load("tiny", verifier={"treshold": 0.9})

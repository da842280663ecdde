"""Which pair is loaded, and with which settings."""

from pathlib import Path

import pytest

import specguard
from specguard.loading import choose, configure
from specguard.models import pairs
from specguard.models.settings import choose_pair
from tests.conftest import TINY


def test_a_replaced_model_keeps_the_pair_s_settings_but_its_bounds() -> None:
    choice = choose("tiny", "cpu", draft="/some/draft")
    assert choice.pair is not None
    own = pairs.PAIRS["tiny"]
    assert (choice.draft, choice.target) == ("/some/draft", own.target["torch"])
    config = configure(choice.pair)
    assert config.num_candidates == own.num_candidates
    assert not config.verifier.bounds
    assert not config.verifier.is_calibrated
    math = configure(choose("qwen2.5-math", "cpu", target="/some/target").pair)
    assert "boxed" in (math.system_prompt or "")


def test_the_default_is_the_user_s_pair_then_one_on_disk_then_the_built_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = choose(None, "cpu")
    assert found.is_fallback
    assert found.pair is pairs.PAIRS["tiny"]
    monkeypatch.setattr(pairs, "is_on_disk", lambda source: "Qwen2.5-Math" in source)
    found = choose(None, "cpu")
    assert found.pair is pairs.PAIRS["qwen2.5-math"]
    assert not found.is_fallback
    choose_pair("llama3")
    assert choose(None, "cpu").pair is pairs.PAIRS["llama3"]


def test_half_a_pair_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(specguard.UsageError, match="go together"):
        specguard.load(draft=str(TINY / "draft"), progress=lambda _: pytest.fail("loaded"))
    with pytest.raises(specguard.UsageError, match="no setting is called 'kandidates'"):
        specguard.load(kandidates=3)


def test_a_plain_method_loads_its_own_model_only() -> None:
    loaded: list[str] = []
    engine = specguard.load("tiny", method="target", progress=loaded.append)
    assert [Path(name).resolve() for name in loaded] == [TINY / "target"]
    assert engine.draft is None

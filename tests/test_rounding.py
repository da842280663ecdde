"""Weights rounded to 4 bits: of a draft where nobody chooses, of any model that is to be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import specguard
from specguard.backends.local.layer import Row
from specguard.backends.pytorch import loading
from specguard.backends.pytorch.matrix import Matrix
from specguard.backends.registry import MeasuredBackend, choose_backend
from specguard.core import SpecguardError, UsageError
from tests.conftest import make_checkpoint

NAMES = ["cpu", "mlx"]


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> MeasuredBackend:
    """The backends that round."""
    if request.param == "mlx":
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    found = choose_backend(request.param)[1]
    assert isinstance(found, MeasuredBackend)
    return found


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model counts as large, on a processor that computes in bfloat16."""
    monkeypatch.setattr(loading, "_LARGE", 0)
    monkeypatch.setattr(loading, "_computes_bfloat16", lambda device: True)


def logits(engine: Any, passes: list[int]) -> Any:
    """Of the tokens 5, 6, ..., so many of them a pass."""
    buffer, found, start = engine.layer.new_buffer(), [], 0
    with engine.layer.computing("it"):
        for count in passes:
            places = list(range(start, start + count))
            row = Row(buffer, start, count, start)
            outputs = engine.layer.forward(
                [row], [5 + p for p in places], places, list(range(count))
            )
            found.append(engine.layer.numpy(outputs.logits))
            start += count
    return np.concatenate(found)


def bfloat16(folder: Path, family: str = "Qwen2", **changes: Any) -> str:
    """A checkpoint in bfloat16, wide enough to be rounded."""
    from transformers import AutoModelForCausalLM

    made = make_checkpoint(folder, family, intermediate_size=128, **changes)
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16)
    model.save_pretrained(made)
    return str(made)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_few_tokens_and_many_see_the_same_rounded_weights(
    family: str, backend: MeasuredBackend, tmp_path: Path
) -> None:
    folder = bfloat16(tmp_path / "model", family)
    exact, rounded = (logits(backend.load(folder, t, False, None), [9]) for t in ("auto", "int4"))
    by_ones = logits(backend.load(folder, "int4", False, None), [1] * 9)
    scale = np.abs(exact).max()
    assert np.abs(by_ones - rounded).max() < 0.05 * scale
    assert 0.05 * scale < np.abs(rounded - exact).max() < scale


def test_a_group_has_sixteen_levels() -> None:
    torch.manual_seed(0)
    weight = torch.randn(128, 96).bfloat16()
    kept = weight.clone()
    with torch.inference_mode():
        matrix = Matrix(weight, None, is_packed=True)
        step = (
            kept.float().unflatten(1, (-1, 32)).amax(-1)
            - kept.float().unflatten(1, (-1, 32)).amin(-1)
        ) / 15
        assert all(len(set(group.tolist())) <= 16 for group in weight.view(-1, 32))
        off = (weight.float() - kept.float()).abs().unflatten(1, (-1, 32)).amax(-1)
        assert bool((off <= 0.6 * step + 0.02).all())
        inputs = torch.randn(3, 96).bfloat16()
        expected = inputs.float() @ weight.float().t()
        assert torch.allclose(matrix(inputs).float(), expected, atol=0.1, rtol=0.02)


def test_what_the_kernel_has_no_form_for_stays_as_it_is() -> None:
    for shape in (100, 96), (128, 90):
        weight = torch.randn(*shape).bfloat16()
        kept = weight.clone()
        Matrix(weight, None, is_packed=True)
        assert torch.equal(weight, kept)


def test_a_model_that_is_not_fused_is_not_rounded(tmp_path: Path) -> None:
    folder = str(make_checkpoint(tmp_path / "granite", "Granite"))
    with pytest.raises(SpecguardError, match="cannot be rounded to 4 bits: fused layers know"):
        choose_backend("cpu")[1].load(folder, "int4", False, None)


def test_a_draft_is_rounded_where_it_pays(large: None, tmp_path: Path) -> None:
    draft, target = bfloat16(tmp_path / "draft"), bfloat16(tmp_path / "target", seed=1)
    single = str(make_checkpoint(tmp_path / "single", "Qwen2"))
    granite = bfloat16(tmp_path / "granite", "Granite")
    assert loading.draft_dtype(draft) == "int4"
    assert loading.draft_dtype(single) == loading.draft_dtype(granite) == "auto"

    def notes(**changes: Any) -> str:
        options: dict[str, Any] = {"backend": "cpu", "draft_cost": None, **changes}
        return "\n".join(specguard.load(draft=draft, target=target, **options).notes)

    assert "the draft's weights are rounded (int4)" in notes()
    for changes in {"draft_dtype": "auto"}, {"draft_dtype": "int4"}, {"dtype": "bfloat16"}:
        assert "rounded" not in notes(**changes)


def test_there_has_to_be_a_draft(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no draft here"):
        specguard.load("tiny", backend="cpu", method="target", draft_dtype="int4")

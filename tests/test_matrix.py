"""Weights that are laid out once: the same products for any count of rows."""

import pytest
import torch
from torch.nn import functional

from specguard.backends.pytorch import matrix
from specguard.backends.pytorch.matrix import Matrix

NUM_ROWS = [*range(1, 12), 16, 17, 33, 64, 65, 129]


@pytest.fixture
def weight() -> torch.Tensor:
    torch.manual_seed(0)
    made = torch.randn(128, 96).bfloat16()
    if not matrix._can_block(made):
        pytest.skip("oneDNN does not multiply in bfloat16 here")
    return made


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_added", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_blocked_weight_multiplies_as_before(
    weight: torch.Tensor, num_rows: int, has_bias: bool, has_added: bool, is_packed: bool
) -> None:
    bias = torch.randn(128).bfloat16() if has_bias else None
    added = torch.randn(num_rows, 128).bfloat16() if has_added else None
    inputs = torch.randn(num_rows, 96).bfloat16()
    with torch.inference_mode():
        blocked = Matrix(weight, bias, is_packed)  # which rounds it
        exact = functional.linear(inputs.float(), weight.float())
        for more in bias, added:
            exact = exact if more is None else exact + more.float()
        assert blocked.lay_out(torch.bfloat16)
        found = blocked(inputs, added)
    assert found.shape == exact.shape
    assert torch.allclose(found.float(), exact, atol=0.2, rtol=0.02)


def test_owners_give_their_weight_up(weight: torch.Tensor) -> None:
    owner = torch.nn.Parameter(weight, requires_grad=False)
    made = Matrix(owner.data, None, owners=[owner])
    assert made.lay_out(torch.bfloat16)
    assert owner.numel() == made.weight.numel() == 0


@pytest.fixture
def wide_weight(number_type: torch.dtype) -> torch.Tensor:
    """Numbers of 16 bits, tiny ones among them."""
    torch.manual_seed(0)
    made = (torch.randn(130, 96) * torch.logspace(-9, 1, 96)).to(number_type)
    if torch.backends.quantized.engine not in matrix._HALF_ENGINES:
        pytest.skip("no kernel reads halves here")
    return made


@pytest.mark.parametrize("number_type", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_added", [False, True])
@pytest.mark.parametrize("is_wide", [False, True])
def test_halves_multiply_in_single_precision(
    wide_weight: torch.Tensor, num_rows: int, has_bias: bool, has_added: bool, is_wide: bool
) -> None:
    bias = torch.randn(130) if has_bias else None
    added = torch.randn(num_rows, 130) if has_added else None
    inputs = torch.randn(96, num_rows).t()
    exact = functional.linear(inputs.double(), wide_weight.double())
    for more in bias, added:
        exact = exact if more is None else exact + more.double()
    with torch.inference_mode():
        halved = Matrix(wide_weight.float() if is_wide else wide_weight, bias)
        assert halved.lay_out(torch.float32)
        found = halved(inputs, added)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= 2e-6 * exact.abs().max()


@pytest.mark.parametrize("value", [1 + 2**-12, 70_000.0, float("nan"), float("inf")])
def test_what_halves_cannot_hold_stays_as_it_is(value: float) -> None:
    weight = torch.ones(2000, 96)
    weight[1500, 7] = value
    owner = torch.nn.Parameter(weight, requires_grad=False)
    made = Matrix(owner.data, None, owners=[owner])
    assert not made.lay_out(torch.float32)
    assert owner.shape == made.weight.shape == (2000, 96)


def test_small_numbers_of_single_precision_stay_as_they_are() -> None:
    made = Matrix(torch.full((64, 96), 2**-13 + 2**-25), None)
    assert not made.lay_out(torch.float32)


@pytest.mark.parametrize("largest", [2.0**20, 2.0**-18])
def test_what_halves_cannot_hold_is_widened(largest: float) -> None:
    weight = torch.full((64, 96), largest * 129 / 128).bfloat16()
    made = Matrix(weight, torch.ones(64).bfloat16())
    assert made.lay_out(torch.float32)
    assert made(torch.ones(2, 96)).eq(96 * float(weight[0, 0]) + 1).all()


def test_counts_of_rows_are_few_and_close() -> None:
    padded = [matrix._padded(n) for n in range(1, 4097)]
    assert len(set(padded)) <= 48
    assert padded[:8] == list(range(1, 9))
    assert all(n <= found <= 1.25 * n for n, found in enumerate(padded, 1))

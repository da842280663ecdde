"""Weights that are laid out once: the same products for any count of rows, of few kinds."""

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
        blocked.block()
        found = blocked(inputs, added)
    assert found.shape == exact.shape
    assert torch.allclose(found.float(), exact, atol=0.2, rtol=0.02)


def test_owners_give_their_weight_up(weight: torch.Tensor) -> None:
    owner = torch.nn.Parameter(weight, requires_grad=False)
    made = Matrix(owner.data, None, owners=[owner])
    made.block()
    assert owner.numel() == made.weight.numel() == 0


def test_single_precision_stays_as_it_is() -> None:
    owner = torch.nn.Parameter(torch.randn(128, 96), requires_grad=False)
    made = Matrix(owner.data, None, owners=[owner])
    made.block()
    assert owner.shape == made.weight.shape == (128, 96)


def test_counts_of_rows_are_few_and_close() -> None:
    padded = [matrix._padded(n) for n in range(1, 4097)]
    assert len(set(padded)) <= 48
    assert padded[:8] == list(range(1, 9))
    assert all(n <= found <= 1.25 * n for n, found in enumerate(padded, 1))

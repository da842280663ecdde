"""``benchmarks.gpu``: what runs on a GPU runs on a small model on a CPU, too."""

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

import torch

from benchmarks.gpu import Line, main, random_model, table


def test_a_pair_is_timed_on_any_device() -> None:
    options = "--device cpu --draft small --target small --dtype float32 --tokens 40 --rounds 1"
    arguments = [*options.split(), "--copied", "8", "--acceptance", "0.5"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    names = [line.split(" | ")[0] for line in result.stdout.splitlines() if line.startswith("| ")]
    for name in (
        "target, a token",
        "draft, a token, transformers generate",
        "draft, a token of 16 candidates",
        "target, 30 tokens read",
        "sd, 50% of the tokens",
        "specguard, 50% of the steps",
        "transformers assisted generation",
    ):
        assert f"| {name}" in names


def test_a_token_reads_each_weight_once() -> None:
    model = random_model("small", torch.device("cpu"), torch.float32, seed=0)
    num_tied = sum(each.numel() for each in model.own.parameters())
    assert model.num_bytes == 4 * num_tied  # the embedding is the head, too
    assert model.layer.why_not_fused is None


def test_shares_are_of_what_the_memory_allows() -> None:
    found = table([Line("target", 0.010, num_bytes=15 * 10**9), Line("sd", 0.004)], 3e12)
    assert "| target | 10.000 | 100 | 50% |" in found
    assert "| sd | 4.000 | 250 |  |" in found

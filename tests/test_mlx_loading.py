"""The MLX backend: what it loads, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import mlx.core as mx
import torch
from mlx_lm.models import base

import specguard
from specguard.backends.local.layer import Row
from specguard.backends.mlx.backend import MLX
from specguard.backends.mlx.loading import load_model
from specguard.core import SpecguardError, UsageError
from tests.conftest import PROBLEM, TINY, eager, make_checkpoint
from tests.contract.calls import run, score_job

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module", params=[4, 8])
def quantised(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The built-in pair in 4 and in 8 bits, by mlx-lm's own converter."""
    from mlx_lm import convert

    folder = tmp_path_factory.mktemp("quantised")
    for role in "draft", "target":
        convert(
            str(TINY / role),
            str(folder / role),
            quantize=True,
            q_bits=request.param,
            q_group_size=32,
        )
    return {role: str(folder / role) for role in ("draft", "target")}


def test_a_quantised_pair_solves(quantised: dict[str, str]) -> None:
    assert "quantization" in json.loads((Path(quantised["target"]) / "config.json").read_text())
    solver = specguard.load("tiny", backend="mlx", **quantised)
    solution = solver.solve(
        "Mia has 24 shells. Mia sells half of the shells. Then Mia finds 9 more shells. "
        "How many shells does Mia have?"
    )
    assert solution.answer == "21"
    assert solution.target == quantised["target"]
    assert not solution.is_calibrated  # the bounds are of the unquantised pair


def test_a_quantised_folder_is_refused_by_torch(quantised: dict[str, str]) -> None:
    from specguard.backends.pytorch.loading import load_model as load_torch

    with pytest.raises(SpecguardError, match="quantised for MLX"):
        load_torch(quantised["draft"])


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, LLAMA3])
def test_rope_settings_are_those_of_transformers(rope: dict[str, Any], tmp_path: Path) -> None:
    # transformers 5 nests them where mlx-lm's Llama does not look.
    folder = make_checkpoint(tmp_path / "rope", rope_parameters={"rope_theta": 500.0, **rope})
    engine = load_model(str(folder))
    prompt = engine.tokenizer.encode_prompt(PROBLEM, None, False)
    step = [60, 61, 62, 63]
    [seen] = run(engine, score_job([step], prompt.token_ids))
    with torch.inference_mode():
        logits = eager(folder)(torch.tensor([[*prompt.token_ids, *step]])).logits[0, -5:-1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(step)[:, None])[:, 0]
    np.testing.assert_allclose(seen.token_logprobs, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("Gemma2", {"head_dim": 16, "sliding_window": 8}, "soft-caps"),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            "sliding-window",
        ),
        ("Mistral", {"sliding_window": 8}, "sliding-window"),
        ("Mamba", {}, "ArraysCache"),
        ("StableLm", {}, "changes keys and values"),
        ("OPT", {}, "Model type opt not supported"),
        ("Glm", {"head_dim": 16}, "positions of glm models"),
        (
            "Llama",
            {"rope_parameters": {"rope_theta": 500.0, "rope_type": "dynamic", "factor": 2.0}},
            "dynamic position scaling",
        ),
        (
            "Qwen2",
            {
                "rope_parameters": {
                    "rope_theta": 500.0,
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "attention_factor": 1.5,
                    "original_max_position_embeddings": 128,
                }
            },
            "attention_factor",
        ),
        ("Llama", {"vocab_size": 600}, "has 600 token ids and its tokenizer 964"),
    ],
)
@pytest.mark.parametrize("role", ["draft", "target"])
def test_what_cannot_be_run_is_refused_at_load_by_name(
    family: str, settings: dict[str, Any], reason: str, role: str, tmp_path: Path
) -> None:
    folder = str(make_checkpoint(tmp_path / family, family, **settings))
    models = {"draft": str(TINY / "draft"), "target": str(TINY / "target"), role: folder}
    with pytest.raises(SpecguardError) as caught:
        specguard.load(backend="mlx", **models)
    assert reason in caught.value.message
    assert folder in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("cache", "reason"),
    [("RotatingKVCache", "RotatingKVCache"), ("QuantizedKVCache", "QuantizedKVCache")],
)
def test_caches_that_cannot_be_cut_back_are_refused(
    cache: str, reason: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.models import cache as caches
    from mlx_lm.models import llama

    made = {"RotatingKVCache": lambda: caches.RotatingKVCache(8)}.get(
        cache, caches.QuantizedKVCache
    )
    monkeypatch.setattr(llama.Model, "make_cache", lambda self: [made() for _ in self.layers])
    with pytest.raises(SpecguardError, match=reason):
        load_model(str(checkpoint))


def test_masks_of_a_model_s_own_are_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.models import llama

    monkeypatch.setattr(llama, "create_attention_mask", lambda h, cache=None: None)
    with pytest.raises(SpecguardError, match="attention masks of its own"):
        load_model(str(checkpoint))


def test_other_caches_get_mlx_lm_s_own_attention(checkpoint: Path) -> None:
    from mlx_lm.models import llama

    load_model(str(checkpoint))
    assert llama.scaled_dot_product_attention is not base.scaled_dot_product_attention
    query = mx.random.normal((1, 4, 3, 16))
    key = mx.random.normal((1, 2, 3, 16))
    arguments = {"cache": None, "scale": 0.25, "mask": "causal"}
    ours = llama.scaled_dot_product_attention(query, key, key, **arguments)
    theirs = base.scaled_dot_product_attention(query, key, key, **arguments)
    assert mx.array_equal(ours, theirs)


def test_the_dtype_is_honoured(checkpoint: Path) -> None:
    sizes = {}
    for name in "float32", "bfloat16", "float16":
        engine = load_model(str(checkpoint), dtype=name)
        outputs = engine.layer.forward([Row(engine.layer.new_buffer(), 0, 1, 0)], [5], [0], [0])
        assert outputs is not None
        assert outputs.logits.dtype == getattr(mx, name)
        sizes[name] = engine.num_bytes_per_token
    assert sizes["float32"] == 2 * sizes["bfloat16"] == 2 * sizes["float16"]
    with pytest.raises(SpecguardError, match="unknown dtype 'int3'"):
        load_model(str(checkpoint), dtype="int3")
    with pytest.raises(UsageError, match="one device"):
        specguard.load("tiny", backend="mlx:1")


def test_damaged_weights_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SpecguardError, match="Missing 1 parameters"):
        load_model(str(folder))


@pytest.mark.parametrize("missing", ["mlx", "mlx_lm"])
def test_a_missing_package_is_said(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "specguard.backends.mlx.backend.find_spec",
        lambda name: None if name == missing else object(),
    )
    with pytest.raises(SpecguardError, match=f"{missing} is not installed") as caught:
        specguard.load("tiny", backend="mlx")
    assert caught.value.hint == "pip install 'specguard[mlx]'"


@pytest.mark.parametrize(("system", "machine"), [("Windows", "AMD64"), ("Darwin", "x86_64")])
def test_another_platform_is_said(
    system: str, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specguard.backends.mlx.backend.platform.system", lambda: system)
    monkeypatch.setattr("specguard.backends.mlx.backend.platform.machine", lambda: machine)
    with pytest.raises(SpecguardError, match=f"this is {system} on {machine}") as caught:
        specguard.load("tiny", backend="mlx")
    assert "--backend cpu" in caught.value.hint


def test_the_status_names_version_device_and_memory() -> None:
    status = MLX.status()
    assert status.is_usable
    assert mx.__version__ in status.version
    assert "mlx-lm" in status.version
    assert status.device
    assert status.memory_bytes


def test_wired_memory_is_what_the_gpu_recommends(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12345})
    monkeypatch.setattr(mx, "set_wired_limit", limits.append)
    load_model(str(checkpoint))
    assert limits == [12345]


def test_a_downloaded_hub_id_is_loaded(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    cache = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(checkpoint, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load_model("owner/name").name == "owner/name"
    with pytest.raises(SpecguardError, match="neither a folder nor a model on this disk") as caught:
        load_model("owner/other")
    assert "specguard models pull owner/other" in caught.value.hint

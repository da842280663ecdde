"""Checkpoints of random weights and a realistic shape: what speed depends on, without the download.

Written without a framework, so that every backend and every peer loads the same files. The
tokenizer is the built-in pair's, so the output head is smaller than a real one.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specguard.core.errors import UsageError
from specguard.models.pairs import BUILT_IN_PAIR, find_pair

_HEAD_DIM = 64
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama: layers, hidden size (a multiple of 64), most positions.

    Heads have 64 dimensions, two of them share keys and values where their number is even, and the
    feed-forward part is 2.75 times as wide as the hidden states.

    Raises:
        UsageError: no layer, or a hidden size that is no multiple of 64.
    """

    num_layers: int
    hidden_size: int
    num_positions: int = 2048

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise UsageError(f"a model has a layer at least, not {self.num_layers}")
        if self.hidden_size < 1 or self.hidden_size % _HEAD_DIM:
            raise UsageError(f"a hidden size is a multiple of {_HEAD_DIM}, not {self.hidden_size}")

    def settings(self) -> dict[str, Any]:
        """The part of a config.json that depends on it."""
        heads = self.hidden_size // _HEAD_DIM
        return {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads,
            "head_dim": _HEAD_DIM,
            "intermediate_size": self.hidden_size * 11 // 4,
            "max_position_embeddings": self.num_positions,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "dtype": "float32",
        }


def write_random_model(folder: Path, shape: Shape, seed: int) -> Path:
    """Write a checkpoint folder that transformers and mlx-lm load; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    _, built_in = find_pair(BUILT_IN_PAIR).sources("torch")
    for name in _TOKENIZER_FILES:
        shutil.copyfile(Path(built_in) / name, folder / name)
    config = json.loads((Path(built_in) / "config.json").read_text()) | shape.settings()
    (folder / "config.json").write_text(json.dumps(config))
    from safetensors.numpy import save_file

    save_file(_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _weights(config: dict[str, Any], seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    keys = config["num_key_value_heads"] * config["head_dim"]

    def matrix(rows: int, columns: int) -> Any:
        # As wide as hidden states stay of one size through the layers.
        return rng.standard_normal((rows, columns), dtype=np.float32) * columns**-0.5

    found = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], hidden),
        "model.norm.weight": np.ones(hidden, dtype=np.float32),
        "lm_head.weight": matrix(config["vocab_size"], hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }
        prefix = f"model.layers.{layer}"
        for name, size in shapes.items():
            found[f"{prefix}.{name}.weight"] = matrix(*size)
        for name in "input_layernorm", "post_attention_layernorm":
            found[f"{prefix}.{name}.weight"] = np.ones(hidden, dtype=np.float32)
    return found

"""The trained reward model as a folder in the format that `specguard.backends.reward` reads."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from recipes.reward.network import RewardNetwork
from recipes.tiny.data import Coder
from recipes.tiny.export import llama_config, llama_weights, save_tokenizer
from recipes.tiny.tokenizer import PAD
from specguard.backends.reward import SETTINGS_KEY


def export(network: RewardNetwork, coder: Coder, folder: Path) -> None:
    """Save a Llama's layers and the head, in bfloat16, with the tokenizer; no language head."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = llama_weights(network)
    del weights["lm_head.weight"]
    for name, value in network.score.state_dict().items():
        weights[f"score.{name}"] = value
    rounded = {name: value.to(torch.bfloat16).contiguous() for name, value in weights.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(coder, folder)
    settings = llama_config(network, coder).to_diff_dict() | {
        "architectures": ["LlamaForProcessRewardModel"],
        "dtype": "bfloat16",
        "rope_theta": network.shape.rope_theta,
        SETTINGS_KEY: {"separator": PAD, "system_prompt": None},
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")

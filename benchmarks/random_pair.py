"""Checkpoints of random weights and a realistic shape: what speed depends on, without the download.

The tokenizer is the built-in pair's, so the output head is smaller than a real one.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from specguard.core.errors import UsageError
from specguard.models.pairs import BUILT_IN_PAIR, find_pair

HEAD_DIM = 64
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write_random_model(
    folder: Path, num_layers: int, hidden_size: int, seed: int, num_positions: int = 2048
) -> str:
    """Write a Llama that every backend and every peer loads, and return its folder's name.

    Heads have 64 dimensions, two of them share keys and values where their number is even, and the
    feed-forward part is 2.75 times as wide as the hidden states.

    Raises:
        UsageError: the hidden size is no multiple of 64.
    """
    if hidden_size % HEAD_DIM:
        raise UsageError(f"a hidden size is a multiple of {HEAD_DIM}, not {hidden_size}")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from specguard.backends.pytorch.loading import quiet

    _, built_in = find_pair(BUILT_IN_PAIR).sources("torch")
    num_heads = hidden_size // HEAD_DIM
    config = LlamaConfig.from_pretrained(
        built_in,
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2 if num_heads % 2 == 0 else num_heads,
        head_dim=HEAD_DIM,
        intermediate_size=hidden_size * 11 // 4,
        max_position_embeddings=num_positions,
        attention_bias=False,
        initializer_range=hidden_size**-0.5,
        dtype="float32",
    )
    torch.manual_seed(seed)
    with quiet():
        LlamaForCausalLM(config).save_pretrained(folder)
    for name in _TOKENIZER_FILES:
        shutil.copyfile(Path(built_in) / name, folder / name)
    return str(folder)


@contextmanager
def random_pair(
    num_layers: int, draft_hidden: int, target_hidden: int
) -> Iterator[tuple[str, str]]:
    """A draft's and a target's folder, for as long as the block lasts."""
    with TemporaryDirectory() as folder:
        yield (
            write_random_model(Path(folder) / "draft", num_layers, draft_hidden, seed=0),
            write_random_model(Path(folder) / "target", num_layers, target_hidden, seed=1),
        )

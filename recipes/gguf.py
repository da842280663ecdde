"""A Hugging Face folder of a Llama as a GGUF file: ``python -m recipes.gguf FOLDER FILE``.

For the built-in pair and the tests' models, whose tokenizer llama.cpp does not have: the file also
holds tokenizer.json, whole, under the name that the format has for it. For other models use
llama.cpp's own ``convert_hf_to_gguf.py``.
"""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from specguard.backends.checkpoint import open_checkpoint
from specguard.backends.tensors import read_tensors

_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHERS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def write(folder: Path, path: Path, is_half: bool = False, has_tokenizer: bool = True) -> Path:
    """Write a folder's model in float32, its matrices in float16 where ``is_half``.

    Without ``has_tokenizer``, the file has the tokens and not the whole tokenizer.json.
    """
    import gguf

    checkpoint = open_checkpoint(str(folder))
    config = checkpoint.config
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(folder.name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokens(writer, folder, config)
    if has_tokenizer:
        content = (folder / "tokenizer.json").read_text(encoding="utf-8")
        writer.add_string("tokenizer.huggingface.json", content)
    names = list(_renamed(config["num_hidden_layers"]))
    for name, array in read_tensors(checkpoint, names).items():
        values = array
        for part, count in ("q_proj", heads), ("k_proj", kv_heads):
            if part in name:
                values = _interleaved(values, count)
        if is_half and values.ndim > 1:
            values = values.astype(np.float16)
        writer.add_tensor(_renamed(config["num_hidden_layers"])[name], values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _renamed(num_layers: int) -> dict[str, str]:
    """Names of tensors in the file, by those in the folder."""
    names = dict(_OTHERS)
    for number in range(num_layers):
        for theirs, ours in _TENSORS.items():
            names[f"model.layers.{number}.{theirs}"] = f"blk.{number}.{ours}"
    return {
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in names.items()
        for kind in ("weight", "bias")
    }


def _interleaved(values: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows of queries or keys as llama.cpp turns them: neighbours, not halves, are a pair."""
    shape = values.shape
    return np.ascontiguousarray(
        values.reshape(num_heads, 2, -1, *shape[1:]).swapaxes(1, 2).reshape(shape)
    )


def _add_tokens(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    import gguf

    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"] for token in data["added_tokens"]}
    ids = data["model"]["vocab"] | {token["content"]: token["id"] for token in data["added_tokens"]}
    names = {number: name for name, number in ids.items()}
    tokens, kinds = [], []
    for number in range(config["vocab_size"]):
        tokens.append(names.get(number, f"[PAD{number}]"))
        is_special = tokens[-1] in special
        kind = gguf.TokenType.CONTROL if is_special else gguf.TokenType.NORMAL
        kinds.append(kind if number in names else gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(data["model"].get("merges") or ["a b"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text(encoding="utf-8"))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--half", is_flag=True, help="Matrices in float16.")
def main(folder: Path, file: Path, half: bool) -> None:
    """Write the Llama in FOLDER as a GGUF FILE."""
    click.echo(write(folder, file, half))


if __name__ == "__main__":
    main()

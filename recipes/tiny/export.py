"""Turn a run's checkpoint into a folder that transformers and mlx-lm load as a Llama.

``python -m recipes.tiny.export --model target --run runs/target --output DIR``
"""

import json
from pathlib import Path

import click
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from recipes.tiny.data import Coder, make_coder
from recipes.tiny.network import Network
from recipes.tiny.recipe import RECIPES, load_network


def llama_config(network: Network, coder: Coder) -> LlamaConfig:
    """A Llama of the network's shape, with biases in its attention.

    Not a Qwen2, which has such biases by nature: in a folder of that type, transformers replaces a
    tokenizer's own splitting by Qwen's.
    """
    shape = network.shape
    return LlamaConfig(
        vocab_size=len(coder.lexicon.word_of),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=2048,
        rms_norm_eps=shape.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=False,
        attention_bias=True,
        eos_token_id=coder.end,
        pad_token_id=coder.pad,
        bos_token_id=None,
    )


def llama_weights(network: Network) -> dict[str, Tensor]:
    """The network's weights under transformers' names; token vectors as their sums."""
    weights = {
        "model.embed_tokens.weight": network.vectors("in"),
        "lm_head.weight": network.vectors("out"),
        "model.norm.weight": network.norm,
    }
    weights |= layer_parameters(network)
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def layer_parameters(network: Network) -> dict[str, Tensor]:
    """The parameters of the network's layers under transformers' names."""
    found: dict[str, Tensor] = {}
    for index, block in enumerate(network.blocks):
        start = f"model.layers.{index}"
        for name, parameter in block.named_parameters():
            part = name.split(".")[0]
            if part.endswith("layernorm"):
                found[f"{start}.{part}.weight"] = parameter
            else:
                group = "self_attn" if part[:2] in ("q_", "k_", "v_", "o_") else "mlp"
                found[f"{start}.{group}.{name}"] = parameter
    return found


def export(network: Network, coder: Coder, folder: Path) -> None:
    """Save in bfloat16 with the tokenizer."""
    llama = LlamaForCausalLM(llama_config(network, coder))
    llama.load_state_dict(llama_weights(network))
    llama.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(coder, folder)
    # mlx-lm's Llama looks for the rotary base here, not where transformers 5 writes it.
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    settings["rope_theta"] = network.shape.rope_theta
    path.write_text(json.dumps(settings, indent=2) + "\n")


def save_tokenizer(coder: Coder, folder: Path) -> None:
    """Save the tokenizer so that every loader takes it as it is."""
    coder.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    # The name that every loader of the folder knows, mlx-lm's included.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings = {key: value for key, value in settings.items() if "local" not in key}
    path.write_text(json.dumps(settings, indent=2) + "\n")


@click.command()
@click.option("--model", "name", type=click.Choice(list(RECIPES)), required=True)
@click.option("--run", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
def main(name: str, run: Path, output: Path) -> None:
    """Export a run's last checkpoint, and compare what was saved with the network."""
    coder = make_coder()
    network = load_network(RECIPES[name], coder.lexicon, run)
    export(network, coder, output)
    saved = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    ids = torch.arange(64)[None] % len(coder.lexicon.word_of)
    with torch.inference_mode():
        ours = torch.nn.functional.linear(network(ids), network.vectors("out"))
        difference = (saved(ids).logits - ours).abs().max()
    size = sum(path.stat().st_size for path in output.iterdir()) / 1e6
    click.echo(f"{output}: {size:.1f} MB; largest difference of a logit {difference:.3f}")


if __name__ == "__main__":
    main()

"""How near a draft with rounded weights stays to itself and to the target, on the target's tokens.

Reads ``solutions.jsonl``; rounds a copy of the draft in several ways::

    python -m recipes.real_pair.rounding --pair PAIR --output STEPS
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from recipes.real_pair.lines import read_lines

Rounding = Callable[[Tensor], Tensor]


def by_groups(weight: Tensor, num_bits: int, group: int) -> Tensor:
    """A scale and an offset for each group of a row; 0: for the row."""
    groups = weight.float().unflatten(1, (-1, group or weight.shape[1]))
    lowest = groups.amin(-1, keepdim=True)
    highest_level = 2**num_bits - 1
    scale = ((groups.amax(-1, keepdim=True) - lowest) / highest_level).clamp_(min=1e-8)
    levels = ((groups - lowest) / scale).round_().clamp_(0, highest_level)
    found: Tensor = (levels * scale + lowest).flatten(1).to(weight.dtype)
    return found


WAYS: dict[str, Rounding | None] = {
    "bfloat16": None,
    "8 bits, a scale for each output": partial(by_groups, num_bits=8, group=0),
    "4 bits, groups of 32": partial(by_groups, num_bits=4, group=32),
    "4 bits, groups of 64": partial(by_groups, num_bits=4, group=64),
    "4 bits, groups of 128": partial(by_groups, num_bits=4, group=128),
}


def log_probs(model: nn.Module, solution: dict[str, Any]) -> Tensor:
    """Of all tokens, in place of each that the target wrote [n, V]."""
    prompt, written = solution["prompt_token_ids"], solution["token_ids"]
    logits = model(torch.tensor([[*prompt, *written]])).logits[0, len(prompt) - 1 : -1]
    found: Tensor = logits.float().log_softmax(-1)
    return found


@click.command()
@click.option("--pair", type=click.Path(path_type=Path), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="What was collected")
@click.option("--limit", default=32, help="Right solutions that are read.")
@torch.inference_mode()
def main(pair: Path, output: Path, limit: int) -> None:
    """Print the table."""
    solutions = [row for row in read_lines(output / "solutions.jsonl") if row["right"]][:limit]
    print(f"{sum(len(each['token_ids']) for each in solutions)} tokens\n")
    print("| weights | its own first choice | the target's | nats a token |\n|---|---|---|---|")
    own: list[Tensor] = []
    for name, rounding in WAYS.items():
        model = AutoModelForCausalLM.from_pretrained(pair / "coder-0.5b", dtype=torch.bfloat16)
        if rounding is not None:
            for module in model.modules():  # the head is the embeddings
                if isinstance(module, nn.Linear | nn.Embedding):
                    rows = module.weight.data.split(8192)
                    module.weight.data = torch.cat([rounding(part) for part in rows])
        model.tie_weights()
        choices, logprobs, tokens = [], [], []
        for solution in solutions:
            found, written = log_probs(model, solution), torch.tensor(solution["token_ids"])
            choices.append(found.argmax(-1))
            logprobs.append(found.gather(1, written.unsqueeze(1)).squeeze(1))
            tokens.append(written)
        own = own or choices
        same = (torch.cat(choices) == torch.cat(own)).float().mean()
        right = (torch.cat(choices) == torch.cat(tokens)).float().mean()
        print(f"| {name} | {same:.1%} | {right:.1%} | {-torch.cat(logprobs).mean():.3f} |")


if __name__ == "__main__":
    main()

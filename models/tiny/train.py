"""The recipe of the built-in pair: ``python -m specguard.models.tiny.train --output DIR``.

Trains the tokenizer, the draft and the target on generated problems and reports greedy accuracy on
fresh ones. A run stopped half-way continues from its last checkpoint when started again.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from specguard.models.tiny import problems
from specguard.models.tiny.tokenizer import train_tokenizer

VOCAB_SIZE = 1024
BATCHES_PER_CHUNK = 8


@dataclass(frozen=True, slots=True)
class Stage:
    """Steps on one task with an optimizer and its peak learning rate."""

    task: Literal["problems", "both actors"]
    num_steps: int
    optimizer: Literal["muon", "adamw"]
    rate: float


@dataclass(frozen=True, slots=True)
class Recipe:
    """Shape and training of one model of the pair."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    stages: tuple[Stage, ...]
    batch_size: int = 32
    seed: int = 0


RECIPES = {
    "draft": Recipe(96, 2, 4, 2, 256, stages=(Stage("problems", 1000, "muon", 3e-3),)),
    "target": Recipe(
        160,
        6,
        4,
        2,
        448,
        stages=(
            Stage("both actors", 2000, "muon", 3e-3),
            Stage("problems", 300, "adamw", 1e-3),
        ),
    ),
}


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A freshly initialised Qwen2 of the recipe's shape."""
    torch.manual_seed(recipe.seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        intermediate_size=recipe.intermediate_size,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def prompt_text(tokenizer: PreTrainedTokenizerFast, problem: str) -> str:
    """The problem in the chat template, ready for the assistant's turn."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    return text


def training_batches(
    tokenizer: PreTrainedTokenizerFast,
    source: Callable[[int], problems.Problem],
    first_step: int,
    num_steps: int,
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Right-padded ``input_ids`` [B, T] and ``labels`` [B, T], -100 outside the solution.

    Batches are cut from chunks of problems sorted by length: a third less padding.
    """
    size = BATCHES_PER_CHUNK * batch_size
    for chunk in range(first_step // BATCHES_PER_CHUNK, num_steps // BATCHES_PER_CHUNK + 1):
        examples = []
        for problem in map(source, range(chunk * size, (chunk + 1) * size)):
            prompt = tokenizer(prompt_text(tokenizer, problem.text))["input_ids"]
            solution = tokenizer(problem.solution)["input_ids"]
            examples.append(([*prompt, *solution, tokenizer.eos_token_id], len(prompt)))
        examples.sort(key=lambda example: len(example[0]))
        order = np.random.default_rng(chunk).permutation(BATCHES_PER_CHUNK)
        for step, batch in enumerate(order.tolist(), chunk * BATCHES_PER_CHUNK):
            if first_step <= step < num_steps:
                yield pad(examples[batch * batch_size : (batch + 1) * batch_size], tokenizer)


def pad(
    examples: list[tuple[list[int], int]], tokenizer: PreTrainedTokenizerFast
) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``labels`` of (token ids, start of the solution) pairs."""
    shape = len(examples), max(len(row) for row, _ in examples)
    input_ids, labels = np.full(shape, tokenizer.pad_token_id), np.full(shape, -100)
    for i, (row, start) in enumerate(examples):
        input_ids[i, : len(row)] = row
        labels[i, start : len(row)] = row[start:]
    return torch.from_numpy(input_ids), torch.from_numpy(labels)


def solution_loss(model: Qwen2ForCausalLM, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over the solution's tokens; padding is on the right, so no mask is needed."""
    hidden = model.model(input_ids[:, :-1]).last_hidden_state
    wanted = labels[:, 1:]
    kept = wanted != -100
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[kept]), wanted[kept])


def learning_rate_factor(step: int, num_steps: int, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))


def greedy_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stream: int, count: int
) -> float:
    """Share of the stream's first ``count`` problems whose greedy answer is right."""
    right = 0
    tokenizer.padding_side = "left"
    for start in range(0, count, 50):
        batch = list(islice(problems.stream(stream, start), min(50, count - start)))
        inputs = tokenizer(
            [prompt_text(tokenizer, p.text) for p in batch], return_tensors="pt", padding=True
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=300, do_sample=False)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], True)
        right += sum(f"\\boxed{{{p.answer}}}" in t for p, t in zip(batch, texts, strict=True))
    return right / count


def make_optimizers(model: Qwen2ForCausalLM, stage: Stage) -> list[Optimizer]:
    """AdamW for everything, or Muon for the layers' matrices and AdamW for the rest."""
    if stage.optimizer == "adamw":
        return [AdamW(model.parameters(), lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.01)]
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return [
        Muon(matrices, lr=stage.rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        AdamW(others, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Qwen2ForCausalLM:
    """Train to the end of the recipe, resuming from ``folder``'s checkpoint if there is one."""
    model = build_model(recipe, tokenizer)
    checkpoint = folder / "checkpoint.pt"
    state: dict[str, Any] = {"stage": 0, "step": 0, "num_problems": 0}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
    model.train()
    for index in range(state["stage"], len(recipe.stages)):
        stage = recipe.stages[index]
        optimizers = make_optimizers(model, stage)
        for optimizer, saved in zip(optimizers, state.get("optimizers", []), strict=False):
            optimizer.load_state_dict(saved)
        seen = state["num_problems"]
        for step, loss in _train_stage(model, tokenizer, recipe, stage, optimizers, state, seen):
            is_last = step == stage.num_steps
            if step % 50 == 0 or is_last:
                record = {"stage": index, "task": stage.task, "step": step, "loss": round(loss, 5)}
                with (folder / "log.jsonl").open("a") as file:
                    file.write(json.dumps(record) + "\n")
            if step % 100 == 0 or is_last:
                state = {
                    "model": model.state_dict(),
                    "optimizers": [] if is_last else [o.state_dict() for o in optimizers],
                    "stage": index + is_last,
                    "step": 0 if is_last else step,
                    "num_problems": seen + step * recipe.batch_size if is_last else seen,
                }
                partial = checkpoint.with_suffix(".partial")
                torch.save(state, partial)
                partial.replace(checkpoint)
    return model.eval()


def _train_stage(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    stage: Stage,
    optimizers: list[Optimizer],
    state: dict[str, Any],
    num_seen: int,
) -> Iterator[tuple[int, float]]:
    """Yield the number of each step and the mean loss of the last 50."""

    def problem(index: int) -> problems.Problem:
        tracks_both = stage.task == "both actors"
        return problems.generate(problems.TRAINING, num_seen + index, tracks_both)

    losses: deque[float] = deque(maxlen=50)
    batches = training_batches(
        tokenizer, problem, state["step"], stage.num_steps, recipe.batch_size
    )
    for step, (input_ids, labels) in enumerate(batches, state["step"]):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = stage.rate * learning_rate_factor(step, stage.num_steps)
        loss = solution_loss(model, input_ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        yield step + 1, sum(losses) / len(losses)


def as_llama(model: Qwen2ForCausalLM) -> LlamaForCausalLM:
    """The same model as a Llama with attention biases, the missing output bias being zero.

    In a folder of type qwen2, transformers replaces a tokenizer's own splitting by Qwen's.
    """
    ours = model.config
    config = LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        num_hidden_layers=ours.num_hidden_layers,
        num_attention_heads=ours.num_attention_heads,
        num_key_value_heads=ours.num_key_value_heads,
        intermediate_size=ours.intermediate_size,
        max_position_embeddings=ours.max_position_embeddings,
        rms_norm_eps=ours.rms_norm_eps,
        rope_parameters=ours.rope_parameters,
        tie_word_embeddings=True,
        attention_bias=True,
        eos_token_id=ours.eos_token_id,
        pad_token_id=ours.pad_token_id,
        bos_token_id=None,
    )
    llama = LlamaForCausalLM(config)
    missing, unexpected = llama.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    for name in missing:
        assert name.endswith("o_proj.bias"), name
        torch.nn.init.zeros_(llama.get_parameter(name))
    return llama.eval()


def export(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> LlamaForCausalLM:
    """Save in bfloat16 with the tokenizer; returns what was saved."""
    llama = as_llama(model).to(torch.bfloat16)
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    # The name that every loader of the folder knows, mlx-lm's included.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings = {key: value for key, value in settings.items() if "local" not in key}
    path.write_text(json.dumps(settings, indent=2) + "\n")
    return llama


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--model", "names", type=click.Choice(list(RECIPES)), multiple=True)
@click.option("--threads", type=int, default=None, help="Threads that torch may use.")
@click.option("--check", type=int, default=200, show_default=True, help="Fresh problems to solve.")
def main(output: Path, names: tuple[str, ...], threads: int | None, check: int) -> None:
    """Train the built-in pair into OUTPUT/draft and OUTPUT/target."""
    if threads is not None:
        torch.set_num_threads(threads)
    tokenizer_folder = output / "tokenizer"
    if not tokenizer_folder.exists():
        texts = (
            f"user\n{p.text}\nassistant\n{p.solution}"
            for p in islice(problems.stream(problems.TRAINING), 5000)
        )
        train_tokenizer(texts, VOCAB_SIZE).save_pretrained(tokenizer_folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    for name in names or tuple(RECIPES):
        folder, work = output / name, output / f"{name}-training"
        work.mkdir(parents=True, exist_ok=True)
        model = train(RECIPES[name], tokenizer, work)
        export(model, tokenizer, folder)
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        reloaded = AutoTokenizer.from_pretrained(folder)
        accuracy = greedy_accuracy(saved, reloaded, problems.CALIBRATION, check)
        click.echo(f"{name}: {accuracy:.1%} of {check} fresh problems right, greedy")


if __name__ == "__main__":
    main()

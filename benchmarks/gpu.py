"""What a GPU makes of a pair: ``python -m benchmarks.gpu --help``.

Random weights in real shapes, made on the device: nothing is downloaded. Steps and decisions are
replayed (`benchmarks.replay`); every pass is computed. One table, beside transformers' ``generate``
and beside what the memory allows: each token reads each weight once.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from benchmarks.cpu_speed import PROMPT_LENGTH, decode_of, seconds_per_step, seconds_to_read
from benchmarks.replay import Schedule, replaying
from specguard.backends.local.engine import LocalEngine
from specguard.backends.pytorch.attention import ATTENTION_NAME, register
from specguard.backends.pytorch.layer import TorchLayer
from specguard.backends.pytorch.loading import quiet
from specguard.backends.tokenizer import FolderTokenizer
from specguard.bench.tables import as_table, machine, machine_line
from specguard.core import Boundary, GenerateJob, Sampling, SolveConfig, Solver
from specguard.core.runner import Runner
from specguard.models.pairs import BUILT_IN_PAIR, find_pair

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "small": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "vocab_size": 1536,
        "tie_word_embeddings": True,
    },
}
NUM_CANDIDATES = 16
STEP_LENGTH = 32
_READ = 30  # tokens that are scored in one pass
_PROBLEM = "Mia has 24 shells. Mia finds 9 more shells. How many shells does Mia have?"


@dataclass(frozen=True, slots=True)
class Model:
    """A model of random weights: by transformers, and as an engine over the same weights."""

    own: PreTrainedModel
    engine: LocalEngine
    layer: TorchLayer

    @property
    def num_bytes(self) -> int:
        """Of the weights that each token reads: all but an embedding that is no head."""
        embedding = self.own.get_input_embeddings()
        assert isinstance(embedding, torch.nn.Embedding)
        head: Any = self.own.get_output_embeddings()
        is_tied = head.weight is embedding.weight
        total = sum(each.numel() * each.element_size() for each in self.own.parameters())
        spared = 0 if is_tied else embedding.weight.numel() * embedding.weight.element_size()
        return int(total - spared)


@dataclass(frozen=True, slots=True)
class Line:
    """Something that was timed: seconds of a pass, and tokens that come of it."""

    name: str
    seconds: float
    num_tokens: float = 1.0
    num_bytes: int = 0  # that it has to read, 0: not said


def random_model(shape: str, device: torch.device, number_type: torch.dtype, seed: int) -> Model:
    """A Qwen2 of this shape on the device, with the built-in pair's tokenizer."""
    register()
    torch.manual_seed(seed)
    config = Qwen2Config(**SHAPES[shape], max_position_embeddings=4096)
    with quiet(), device:
        own = AutoModelForCausalLM.from_config(
            config, attn_implementation=ATTENTION_NAME, dtype=number_type
        )
    own.generation_config.eos_token_id = None
    own.generation_config.pad_token_id = 0
    layer = TorchLayer(own, shape, config.vocab_size)
    tokenizer = FolderTokenizer(Path(find_pair(BUILT_IN_PAIR).sources("torch")[0]))
    engine = LocalEngine(shape, layer, tokenizer, config.max_position_embeddings)
    return Model(own, engine, layer)


def bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes a second, as a large copy reads and writes them."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        _wait(device)
        started = time.perf_counter()
        copy.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * num_bytes / median(seconds[1:])


def passes(draft: Model, target: Model, num_tokens: int, rounds: int) -> Iterator[Line]:
    """Decoding by each model, side by side, and reading a step."""
    rng = np.random.default_rng(0)
    known = sorted(target.engine.tokenizer.vocabulary.values())
    text = tuple(rng.choice(known, size=PROMPT_LENGTH + _READ).tolist())
    prompts = [text[:PROMPT_LENGTH]]

    with Runner() as runner:
        for name, model in ("target", target), ("draft", draft):
            decode = decode_of(model.engine, runner, prompts)

            def step(decode: Callable[[int, int], None] = decode) -> float:
                return seconds_per_step(decode, 1, num_tokens)

            yield _line(f"{name}, a token", step, rounds, model)
            fixed = model.layer.fixed
            if fixed is not None and fixed.why_not_recorded is None:
                fixed.why_not_recorded = "for comparison"
                fixed.forget()
                yield _line(f"{name}, a token, not recorded", step, rounds, model)
                fixed.why_not_recorded = None
                fixed.forget()
            peer = _generating(model.own, prompts[0])
            yield _line(
                f"{name}, a token, transformers generate",
                lambda peer=peer: seconds_per_step(peer, 1, num_tokens),  # type: ignore[misc]
                rounds,
                model,
            )
        sampled = _sampling(draft.engine, runner, prompts[0])
        line = _line(
            f"draft, a token of {NUM_CANDIDATES} candidates",
            lambda: seconds_per_step(sampled, NUM_CANDIDATES, num_tokens),
            rounds,
            draft,
        )
        yield replace(line, num_tokens=NUM_CANDIDATES)
        line = _line(
            f"target, {_READ} tokens read",
            lambda: seconds_to_read(target.engine, runner, prompts[0], text[PROMPT_LENGTH:]),
            rounds,
            target,
        )
        yield replace(line, num_tokens=_READ)


def solutions(
    draft: Model, target: Model, acceptances: Sequence[float], num_tokens: int, rounds: int
) -> Iterator[Line]:
    """Whole solutions with replayed decisions; seconds a token."""
    solver = Solver(draft.engine, target.engine, SolveConfig())
    num_steps = max(1, round(num_tokens / STEP_LENGTH))

    def line(name: str, solver: Solver, **changes: Any) -> Line:
        def once() -> float:
            started = time.perf_counter()
            solution = solver.solve(_PROBLEM, **changes)
            return (time.perf_counter() - started) / solution.stats.num_tokens

        return _line(name, once, rounds)

    plain = replaying(solver, Schedule.of(num_steps, STEP_LENGTH, 0.0))
    yield line("target", plain, method="target")
    for share in acceptances:
        schedule = Schedule.of(num_steps, STEP_LENGTH, share)
        yield line(f"sd, {share:.0%} of the tokens", replaying(solver, schedule, True), method="sd")
        yield line(f"specguard, {share:.0%} of the steps", replaying(solver, schedule))
    prompt = target.engine.tokenizer.encode_prompt(_PROBLEM, None, False).token_ids
    length = num_steps * STEP_LENGTH
    for name, options in ("generate", {}), ("assisted generation", {"assistant_model": draft.own}):
        write = _generating(target.own, prompt, **options)

        def once(write: Callable[[int, int], None] = write) -> float:
            started = time.perf_counter()
            write(1, length)
            return (time.perf_counter() - started) / length

        yield _line(f"transformers {name}", once, rounds)


def _line(name: str, once: Callable[[], float], rounds: int, model: Model | None = None) -> Line:
    """The median of several rounds, behind one for nothing."""
    once()
    seconds = median(once() for _ in range(rounds))
    return Line(name, seconds, num_bytes=0 if model is None else model.num_bytes)


def _generating(
    model: PreTrainedModel, prompt: Sequence[int], **options: Any
) -> Callable[[int, int], None]:
    """Greedy decoding by transformers; of random weights an assistant is right by chance alone."""

    def decode(num_rows: int, num_tokens: int) -> None:
        inputs = torch.tensor([list(prompt)] * num_rows, device=model.device)
        with quiet(), torch.inference_mode():
            model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                **options,
            )
        _wait(model.device)

    return decode


def _sampling(
    engine: LocalEngine, runner: Runner, prompt: tuple[int, ...]
) -> Callable[[int, int], None]:
    """Several candidates of one problem."""

    def decode(num_candidates: int, num_tokens: int) -> None:
        draws = np.random.default_rng(0).random((num_candidates, num_tokens), dtype=np.float32)
        job = GenerateJob(
            key=0,
            prefix=prompt,
            sampling=Sampling(),
            boundary=Boundary("", frozenset(), num_tokens),
            num_candidates=num_candidates,
            uniforms=draws,
        )
        runner.run(engine.generate(job))
        engine.release(0)

    return decode


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(lines: Sequence[Line], bytes_per_second: float) -> str:
    """Milliseconds a pass, tokens a second, and the share of what the memory allows."""
    rows = []
    for line in lines:
        share = ""
        if line.num_bytes:
            share = f"{line.num_bytes / bytes_per_second / line.seconds:.0%}"
        speed = line.num_tokens / line.seconds
        rows.append([line.name, f"{line.seconds * 1e3:.3f}", f"{speed:.0f}", share])
    return as_table(["", "ms", "tokens/s", "of the memory's limit"], rows)


_POSITIVE = click.IntRange(min=1)


@click.command(context_settings={"show_default": True})
@click.option("--device", "device_name", default="cuda")
@click.option("--draft", type=click.Choice(list(SHAPES)), default="qwen2.5-1.5b")
@click.option("--target", type=click.Choice(list(SHAPES)), default="qwen2.5-7b")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16")
@click.option(
    "--acceptance",
    "acceptances",
    type=click.FloatRange(0, 1),
    multiple=True,
    default=(0.5, 0.7, 0.85, 0.9),
    help="Share of the steps, or tokens, that are accepted; may be given several times.",
)
@click.option("--tokens", type=_POSITIVE, default=256, help="Of a solution, and of a decoding.")
@click.option("--rounds", type=_POSITIVE, default=3)
@click.option("--copied", type=_POSITIVE, default=2048, help="MiB; how fast the memory is.")
def main(
    device_name: str,
    draft: str,
    target: str,
    dtype: str,
    acceptances: tuple[float, ...],
    tokens: int,
    rounds: int,
    copied: int,
) -> None:
    """Time a pair of random weights on a GPU; medians over rounds."""
    device = torch.device(device_name)
    number_type: torch.dtype = getattr(torch, dtype)
    bytes_per_second = bandwidth(device, copied * 2**20)
    models = [
        random_model(shape, device, number_type, seed) for seed, shape in enumerate((draft, target))
    ]
    about = {**machine(), "dtype": dtype, "draft": draft, "target": target}
    if device.type == "cuda":
        about["GPU"] = torch.cuda.get_device_name(device)
    click.echo(machine_line(about))
    click.echo(f"Memory: {bytes_per_second / 1e9:.0f} GB/s, copying.")
    lines = list(passes(models[0], models[1], tokens, rounds))
    click.echo(f"\n{table(lines, bytes_per_second)}")
    lines = list(solutions(models[0], models[1], acceptances, tokens, rounds))
    click.echo(f"\n{table(lines, bytes_per_second)}")
    for shape, model in zip((draft, target), models, strict=True):
        click.echo(f"{shape}: {model.layer.why_not_recorded or 'recorded as CUDA graphs'}.")


if __name__ == "__main__":
    main()

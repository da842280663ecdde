"""Families of hub models with one tokenizer, and which of them are put together.

Parameters and the shapes of keys and values are those of the models' cards and configs: they say
what a pair takes before it is downloaded. No weights of these are known here, nor any settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from specguard.backends.memory import ModelSize


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model's ids on the hub, as it was published and quantised to 4 bits for MLX."""

    torch: str
    mlx: str
    size: ModelSize


@dataclass(frozen=True, slots=True)
class Family:
    """Models by size, and pairs of these: draft, then target; the first pair has its name.

    ``thinks`` marks models that always think before they answer. ``context_limit`` is the window
    that they were trained for, ``reward`` a process reward model for what they solve.
    """

    name: str
    description: str
    models: Mapping[str, HubModel]
    pairs: tuple[tuple[str, str], ...]
    context_limit: int
    thinks: bool = False
    reward: str | None = None


def _model(
    name: str,
    billions: float,
    layers: int,
    kv_heads: int,
    head_dim: int = 128,
    owner: str = "Qwen",
    mlx: str | None = None,
) -> HubModel:
    return HubModel(
        f"{owner}/{name}",
        f"mlx-community/{mlx or name}-4bit",
        ModelSize(round(billions * 1e9), 2 * layers * kv_heads * head_dim),
    )


def _qwen3() -> dict[str, HubModel]:
    shapes = {
        "0.6b": (0.60, 28),
        "1.7b": (1.72, 28),
        "4b": (4.02, 36),
        "8b": (8.19, 36),
        "14b": (14.77, 40),
        "32b": (32.76, 64),
    }
    return {
        size: _model(f"Qwen3-{size.upper()}", billions, layers, 8)
        for size, (billions, layers) in shapes.items()
    }


def _qwen25(prefix: str, *sizes: str, owner: str = "Qwen", suffix: str = "") -> dict[str, HubModel]:
    """Models of the shapes of Qwen2.5."""
    shapes = {
        "0.5b": (0.49, 24, 2, 64),
        "1.5b": (1.54, 28, 2, 128),
        "7b": (7.62, 28, 4, 128),
        "14b": (14.77, 48, 8, 128),
        "32b": (32.76, 64, 8, 128),
    }
    return {
        size: _model(f"{prefix}-{size.upper()}{suffix}", *shapes[size], owner=owner)
        for size in sizes
    }


def _llama3() -> dict[str, HubModel]:
    model = partial(_model, kv_heads=8, owner="meta-llama")
    return {
        "1b": model("Llama-3.2-1B-Instruct", 1.24, 16, head_dim=64),
        "3b": model("Llama-3.2-3B-Instruct", 3.21, 28),
        "8b": model("Llama-3.1-8B-Instruct", 8.03, 32, mlx="Meta-Llama-3.1-8B-Instruct"),
        "70b": model("Llama-3.3-70B-Instruct", 70.55, 80),
    }


_R1 = _qwen25("DeepSeek-R1-Distill-Qwen", "1.5b", "7b", "14b", "32b", owner="deepseek-ai")
FAMILIES = (
    Family(
        "qwen3",
        "Qwen3, general purpose; thinks before it answers where asked to (--thinking)",
        _qwen3(),
        (
            ("0.6b", "8b"),
            ("0.6b", "4b"),
            ("0.6b", "14b"),
            ("1.7b", "8b"),
            ("1.7b", "14b"),
            ("1.7b", "32b"),
        ),
        context_limit=40960,
    ),
    Family(
        "qwen2.5-math",
        "Qwen2.5-Math Instruct, mathematics; the paper's pair",
        _qwen25("Qwen2.5-Math", "1.5b", "7b", suffix="-Instruct"),
        (("1.5b", "7b"),),
        context_limit=4096,
        reward="Qwen/Qwen2.5-Math-PRM-7B",
    ),
    Family(
        "qwen2.5-coder",
        "Qwen2.5-Coder Instruct, programs and mathematics",
        _qwen25("Qwen2.5-Coder", "0.5b", "1.5b", "7b", suffix="-Instruct"),
        (("0.5b", "1.5b"), ("0.5b", "7b")),
        context_limit=32768,
    ),
    Family(
        "qwen2.5",
        "Qwen2.5 Instruct, general purpose",
        _qwen25("Qwen2.5", "1.5b", "7b", suffix="-Instruct"),
        (("1.5b", "7b"),),
        context_limit=32768,
    ),
    Family(
        "deepseek-r1",
        "DeepSeek-R1 distilled into Qwen2.5; always thinks before it answers",
        # Its embeddings and its head are not one, as those of the small Qwen2.5 are.
        _R1 | {"1.5b": _model("DeepSeek-R1-Distill-Qwen-1.5B", 1.78, 28, 2, owner="deepseek-ai")},
        (("1.5b", "7b"), ("1.5b", "14b"), ("1.5b", "32b")),
        context_limit=131072,
        thinks=True,
    ),
    Family(
        "llama3",
        "Llama 3.2, with 3.1 (8B) or 3.3 (70B), Instruct, general purpose; the hub asks for "
        "consent to its licence",
        _llama3(),
        (("1b", "8b"), ("1b", "3b"), ("1b", "70b"), ("3b", "70b")),
        context_limit=131072,
    ),
)

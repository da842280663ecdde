"""Loading a checkpoint into MLX: dtype, memory, and which models can be used."""

from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.utils import _get_classes
from mlx_lm.utils import load_model as load_mlx_model

from specguard.backends.checkpoint import PACKED, Checkpoint, open_checkpoint
from specguard.backends.local.engine import LocalEngine
from specguard.backends.memory import Demand, ModelSize, this_machine
from specguard.backends.mlx.layer import MlxLayer
from specguard.backends.tokenizer import FolderTokenizer
from specguard.core.errors import SpecguardError

_GROUP = 64  # weights of a row that share a scale and an offset
_BYTES_QUANTISED = 0.5 + 2 * 2 / _GROUP
_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def load_model(
    source: str, dtype: str = "auto", trust_remote_code: bool = False, is_headless: bool = False
) -> LocalEngine:
    """Load a folder or a downloaded hub id (``owner/name[@revision]``), quantised or not.

    ``dtype`` "auto" is what the checkpoint holds on a GPU and float32 on a CPU. Quantised weights
    stay as they are; the dtype is then that of everything else. "int4" quantises weights that are
    not. ``is_headless`` is for reward models: a language head is not asked for.

    Raises:
        SpecguardError: too little memory, or a checkpoint that is missing, broken, or of a kind
            that mlx-lm or this backend cannot run.
    """
    number_type = _dtype(dtype)
    checkpoint = open_checkpoint(source)
    checkpoint.check_head(is_headless)
    if dtype == PACKED and "quantization" in checkpoint.config:
        raise SpecguardError(f"{source} is quantised already", "leave out that it is to be int4")
    refusal = checkpoint.capture_refusal or _rope_refusal(checkpoint)
    if refusal is not None:
        raise SpecguardError(
            f"{source} cannot be run by the MLX backend: {refusal}",
            "choose a model with plain attention in every layer, or --backend cpu",
        )
    tokenizer = FolderTokenizer(checkpoint.folder, trust_remote_code)
    _raise_wired_limit()
    try:
        model, _ = load_mlx_model(
            checkpoint.folder,
            lazy=True,
            model_config=_rope_settings(checkpoint.text_config)
            | ({"tie_word_embeddings": True} if is_headless else {}),
            get_model_classes=_headless_classes if is_headless else _get_classes,
            trust_remote_code=trust_remote_code and not is_headless,
        )
        if number_type is not None:
            model.set_dtype(number_type)
        if dtype == PACKED:
            nn.quantize(model, _GROUP, 4, class_predicate=_fits)
        mx.eval(model.parameters())
    # A module of mlx-lm that lacks a package of its own exits at import.
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SpecguardError(
            f"{source} ({checkpoint.model_type}) cannot be loaded: {reason}", _hint(reason)
        ) from error
    num_tokens = max(tokenizer.vocabulary.values()) + 1
    return LocalEngine(
        source,
        MlxLayer(model, f"{source} ({checkpoint.model_type})", num_tokens),
        tokenizer,
        context_limit=checkpoint.context_limit,
    )


def _fits(_: str, module: Any) -> bool:
    """Whether a module's weight can be quantised in groups."""
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % _GROUP == 0


def _headless_classes(config: dict[str, Any]) -> tuple[type[Any], type[Any]]:
    """The classes of a config, the model without what stands above its layers."""
    base, arguments = _get_classes(config)

    def sanitize(self: Any, weights: dict[str, Any]) -> dict[str, Any]:
        # mlx-lm refuses weights that it has no place for.
        above = ("score.", "lm_head.")
        kept = {name: value for name, value in weights.items() if not name.startswith(above)}
        cleaned: dict[str, Any] = base.sanitize(self, kept) if hasattr(base, "sanitize") else kept
        return cleaned

    # Under the module of the model itself, which messages name.
    return type(
        "Headless", (base,), {"sanitize": sanitize, "__module__": base.__module__}
    ), arguments


def _rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 5 nests under ``rope_parameters``, where most of mlx-lm's models look."""
    nested = config.get("rope_parameters")
    if not isinstance(nested, dict) or any(isinstance(part, dict) for part in nested.values()):
        return {}
    found = {
        key: nested[key]
        for key in ("rope_theta", "partial_rotary_factor")
        if key in nested and key not in config
    }
    kind = nested.get("rope_type", "default")
    if kind != "default" and not config.get("rope_scaling"):
        found["rope_scaling"] = {"type": kind, **nested}
    return found


def _rope_refusal(checkpoint: Checkpoint) -> str | None:
    """Why mlx-lm would load a model and place its tokens otherwise than transformers, or None."""
    config = checkpoint.text_config
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if checkpoint.model_type == "glm":
        return "mlx-lm reads positions of glm models wrongly"
    if kind in ("longrope", "su", "dynamic"):
        return f"mlx-lm has {kind} position scaling only in part"
    if kind == "yarn" and settings.get("attention_factor") is not None:
        return "mlx-lm ignores the attention_factor of yarn position scaling"
    return None


def demand(source: str, dtype: str) -> Demand:
    """What a model will take of this machine's memory, which a Mac's GPU shares."""
    number_type = _dtype(dtype)
    checkpoint = open_checkpoint(source)
    size = 2 if number_type is None else number_type.size
    weights = checkpoint.num_bytes
    if dtype == PACKED:
        weights = round(checkpoint.num_parameters * _BYTES_QUANTISED)
    elif number_type is not None and "quantization" not in checkpoint.config:
        weights = checkpoint.num_parameters * size
    return Demand(source, this_machine(), weights, checkpoint.num_cached_numbers * size)


def estimate(size: ModelSize) -> Demand:
    """What a model of this size would take, quantised to 4 bits."""
    num_bytes = 2 if _dtype("auto") is None else 4
    weights = round(size.num_parameters * _BYTES_QUANTISED)
    return Demand("", this_machine(), weights, size.num_cached_numbers * num_bytes)


def _raise_wired_limit() -> None:
    """Let the GPU keep what it recommends in memory, as mlx-lm does while it generates."""
    size = mx.device_info().get("max_recommended_working_set_size")
    if mx.metal.is_available() and size is not None:
        mx.set_wired_limit(size)


def _hint(reason: str) -> str:
    if "not supported" in reason:
        return "mlx-lm has no such model: pip install --upgrade mlx-lm, or --backend cpu"
    if "trust_remote_code" in reason:
        return "a model with code of its own needs --trust-remote-code"
    if "allocate" in reason:
        return "choose a smaller or quantised pair (4-bit), or close other programs"
    return "mlx-lm does not read this config or these weights: check them, or try --backend cpu"


def _dtype(name: str) -> mx.Dtype | None:
    if name in ("auto", PACKED):
        return None if mx.default_device() == mx.gpu else mx.float32
    if name not in _DTYPES:
        raise SpecguardError(
            f"unknown dtype {name!r}", f"dtypes: auto, {', '.join(_DTYPES)}, {PACKED}"
        )
    return _DTYPES[name]

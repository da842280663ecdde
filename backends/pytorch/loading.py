"""Loading a checkpoint into torch: device, dtype, memory, and which models can be used."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from specguard.backends.checkpoint import PACKED, Checkpoint, open_checkpoint
from specguard.backends.local.engine import LocalEngine
from specguard.backends.memory import Demand, ModelSize, Place, this_machine
from specguard.backends.pytorch.attention import ATTENTION_NAME, register
from specguard.backends.pytorch.fused import why_config_not_fused
from specguard.backends.pytorch.layer import TorchLayer, is_out_of_memory
from specguard.backends.pytorch.matrix import PACKED_BYTES, reads_halves
from specguard.backends.tokenizer import FolderTokenizer
from specguard.core.errors import SpecguardError
from specguard.core.reference import is_reference

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    PACKED: torch.bfloat16,
}
_LARGE = 10**8  # parameters
_USABLE_LAYERS = {"full_attention", "sliding_attention"}


def load_model(
    source: str,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    is_headless: bool = False,
) -> LocalEngine:
    """Load a folder or a downloaded hub id (``owner/name[@revision]``).

    ``dtype`` "auto" is bfloat16 on CUDA, and on a CPU and MPS float32, or bfloat16 for a large
    checkpoint in bfloat16 where the device computes with it; float16 is kept on MPS. Weights of 16
    bits stay so
    where single precision is computed, if a kernel allows it; "int4" is bfloat16 with weights
    rounded to 4 bits. ``is_headless`` is for reward models: a language head is not asked
    for.

    Raises:
        SpecguardError: no such device, too little memory, or a checkpoint that is missing, broken
            or of a kind that cannot be cut back.
    """
    place = _device(device)
    checkpoint = open_checkpoint(source)
    number_type = _dtype(dtype, place, checkpoint.num_parameters, checkpoint.number_type)
    is_halved = (
        not is_headless
        and _can_be_fused(checkpoint)
        and _is_halved(number_type, place, checkpoint.num_parameters, checkpoint.number_type)
    )
    checkpoint.check_head(is_headless)
    _check_usable(checkpoint)
    refusal = checkpoint.capture_refusal
    tokenizer = FolderTokenizer(checkpoint.folder, trust_remote_code)
    register()
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                output_loading_info=True,
                dtype=torch.bfloat16 if is_halved else number_type,
                device_map={"": place},  # straight to the device
                attn_implementation=ATTENTION_NAME if refusal is None else "eager",
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code and not is_headless,
                # The embeddings stand in for a language head that may not be there.
                **({"tie_word_embeddings": True} if is_headless else {}),
            )
    except Exception as error:
        if is_out_of_memory(error):
            raise _out_of_memory(checkpoint, place) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SpecguardError(
            f"{source} ({checkpoint.model_type}) cannot be loaded: {reason}",
            "a model with code of its own needs --trust-remote-code"
            if "trust_remote_code" in str(error)
            else "",
        ) from error
    absent = sorted(report["missing_keys"])
    if absent:
        raise SpecguardError(
            f"the weights of {source} lack {absent[0]} and {len(absent) - 1} more",
            "download or copy them again",
        )
    num_tokens = max(tokenizer.vocabulary.values()) + 1
    layer = TorchLayer(
        model, source, num_tokens, dtype == PACKED, number_type if is_halved else None
    )
    return LocalEngine(
        source,
        layer,
        tokenizer,
        context_limit=checkpoint.context_limit,
        attention_refusal=refusal,
        note=_note(layer),
    )


def _note(layer: TorchLayer) -> str:
    """What costs time."""
    if layer.device.type == "mps":  # nothing else is to be expected there
        return ""
    if layer.why_not_fused is not None:
        return f"transformers' own layers run it: {layer.why_not_fused}"
    if layer.device.type == "cuda" and layer.why_not_recorded is not None:
        return f"its passes are not recorded as CUDA graphs: {layer.why_not_recorded}"
    return ""


def draft_dtype(source: str) -> str:
    """What a draft is best loaded as on a CPU: "int4" where that is known to pay, else "auto".

    It pays where a pass takes as long as reading the weights does, in a type that is computed with.
    """
    checkpoint = open_checkpoint(source)
    number_type = _dtype(
        "auto", torch.device("cpu"), checkpoint.num_parameters, checkpoint.number_type
    )
    can_be_rounded = number_type == torch.bfloat16 and _can_be_fused(checkpoint)
    return PACKED if can_be_rounded else "auto"


def _can_be_fused(checkpoint: Checkpoint) -> bool:
    return (
        not is_reference()
        and checkpoint.capture_refusal is None
        and "quantization_config" not in checkpoint.config
        and why_config_not_fused(checkpoint.config) is None
    )


def demand(source: str, device: str, dtype: str) -> Demand:
    """What a model will take of the memory of its device; arguments as in `load_model`."""
    checkpoint = open_checkpoint(source)
    size = ModelSize(checkpoint.num_parameters, checkpoint.num_cached_numbers)
    can_be_fused = _can_be_fused(checkpoint)
    return _demand(source, size, device, dtype, checkpoint.number_type, can_be_fused)


def estimate(size: ModelSize, device: str) -> Demand:
    """What a model in bfloat16 of this size would take, loaded with dtype "auto"."""
    return _demand("", size, device, "auto", "bfloat16", can_be_fused=True)


def _demand(
    name: str, size: ModelSize, device: str, dtype: str, held: str, can_be_fused: bool
) -> Demand:
    place = _device(device)
    number_type = _dtype(dtype, place, size.num_parameters, held)
    is_halved = can_be_fused and _is_halved(number_type, place, size.num_parameters, held)
    num_bytes = 2 if is_halved else number_type.itemsize
    num_packed_bytes = PACKED_BYTES if dtype == PACKED else 0
    memory = this_machine()
    if place.type == "cuda":
        # "cuda" and "cuda:0" are one.
        memory = Place(f"GPU {place.index or 0}", torch.cuda.mem_get_info(place)[0])
    return Demand(
        name,
        memory,
        round(size.num_parameters * (num_bytes + num_packed_bytes)),
        size.num_cached_numbers * number_type.itemsize,
    )


def _check_usable(checkpoint: Checkpoint) -> None:
    if "quantization" in checkpoint.config:
        raise SpecguardError(
            f"{checkpoint.name} is quantised for MLX",
            "choose --backend mlx, or the checkpoint that it was made from",
        )
    config = checkpoint.text_config
    unusable = set(config.get("layer_types") or []) - _USABLE_LAYERS
    if unusable:
        raise SpecguardError(
            f"{checkpoint.name} ({checkpoint.model_type}) has layers whose state cannot be cut "
            f"back: {', '.join(sorted(unusable))}",
            "choose a model with attention in every layer",
        )


def _out_of_memory(checkpoint: Checkpoint, device: torch.device) -> SpecguardError:
    return SpecguardError(
        f"{checkpoint.name} does not fit into the memory of {device}",
        "choose a smaller pair, or close other programs",
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SpecguardError(f"torch knows no device {name!r}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SpecguardError(
                "no CUDA GPU can be used here",
                "choose --backend cpu; with a GPU, install a CUDA build of torch and its driver",
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise SpecguardError(
                f"there is no GPU {name}: this machine has {torch.cuda.device_count()}"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise SpecguardError(
            "no Metal GPU can be used by torch here", "choose --backend cpu; MPS needs a Mac"
        )
    return device


def _dtype(name: str, device: torch.device, num_parameters: int, held: str) -> torch.dtype:
    """What is computed with, of a checkpoint that holds numbers of the type ``held``."""
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16
        if device.type == "mps" and held == "float16":
            return torch.float16  # else it overflows
        # What fits a processor's cache gains nothing by being half as large.
        is_half = num_parameters >= _LARGE and held == "bfloat16" and _computes_bfloat16(device)
        return torch.bfloat16 if is_half else torch.float32
    if name not in _DTYPES:
        raise SpecguardError(f"unknown dtype {name!r}", f"dtypes: auto, {', '.join(_DTYPES)}")
    if name == PACKED and device.type != "cpu":
        raise SpecguardError(
            f"torch rounds weights to 4 bits on a CPU alone, not on {device}",
            "try --dtype auto, or a checkpoint that is quantised already",
        )
    return _DTYPES[name]


def _is_halved(
    number_type: torch.dtype, device: torch.device, num_parameters: int, held: str
) -> bool:
    """Whether weights stay in 16 bits where single precision is computed (`Matrix.lay_out`)."""
    return (
        device.type == "cpu"
        and number_type == torch.float32
        and held == "bfloat16"
        and num_parameters >= _LARGE
        and reads_halves()
    )


def _computes_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is multiplied as it is (AVX512-BF16, AMX; Arm's BF16; Metal of macOS 14)."""
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    # Older versions of torch do not tell of Arm's.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.cpu._is_avx512_bf16_supported() or bool(capabilities.get("bf16"))


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and warnings of transformers meanwhile; settings are put back."""
    had_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()

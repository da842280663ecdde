"""Loading a GGUF file: checks, parameters, memory, and a probe of what can be captured."""

import ctypes
import os
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import psutil

from specguard.backends.checkpoint import read_gguf
from specguard.backends.gguf import GGUF
from specguard.backends.llamacpp.arguments import parsed_arguments
from specguard.backends.llamacpp.context import Context
from specguard.backends.llamacpp.layer import NUM_SEQUENCES, LlamaLayer
from specguard.backends.llamacpp.library import Tensors, has_amx, heard, library
from specguard.backends.llamacpp.tokenizer import GGUFTokenizer
from specguard.backends.local.engine import LocalEngine
from specguard.backends.local.layer import Row, RowCapture
from specguard.backends.memory import Demand, Place, this_machine
from specguard.core.engine import Capture
from specguard.core.errors import SpecguardError, UsageError

BATCH = 2048  # tokens of one call
# By up to 0.05 of a log-probability.
_INEXACT = "what llama.cpp computes with rounded numbers depends on what else is in a pass"
MICROBATCH = 128  # of them through the graph together: a row of logits is reserved for each
_FLOAT_TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}  # as ggml numbers them
_CACHE_BYTES = {0: 4.0, 1: 2.0, 30: 2.0}  # a number; about 1.1 of quantised ones, at most


class Model:
    """A model in llama.cpp's hands, and the parameters of contexts over it.

    Raises:
        SpecguardError: llama.cpp cannot load it, or it cannot be run step by step.
    """

    def __init__(self, file: GGUF, arguments: Mapping[str, str]) -> None:
        api = self._api = library()
        self.name = file.name
        of_model, self._of_context = parsed_arguments(arguments)
        params = api.llama_model_default_params()
        # AMX: wrong numbers or the end of the process, in the release that was tried.
        params.use_extra_bufts = not has_amx()
        for name, value in of_model.items():
            setattr(params, name, value)
        path = str(file.path).encode()
        pointer, reason = heard(api.llama_model_load_from_file, path, params)
        if not pointer:
            raise SpecguardError(
                f"llama.cpp cannot load {file.name} ({file.architecture}): {reason or 'no reason'}",
                "download or copy the file again, or update llama-cpp-python",
            )
        self.pointer = pointer
        self._close = weakref.finalize(self, api.llama_model_free, pointer)
        refusal = _refusal(api, pointer, file)
        if refusal:
            raise SpecguardError(
                f"{file.name} ({file.architecture}) {refusal}", "choose another model"
            )
        self.vocabulary = api.llama_model_get_vocab(pointer)
        self.num_logits = int(api.llama_vocab_n_tokens(self.vocabulary))
        self.num_layers = int(api.llama_model_n_layer(pointer))
        self.num_bytes_per_token = _bytes_per_token(file, self._of_context)
        self.batch_size = BATCH
        self.tensors = Tensors()
        self._of_context.setdefault("type_k", _cache_type(file))
        self._of_context.setdefault("type_v", _cache_type(file))
        self.is_fused = self._of_context.get("flash_attn_type", 0) != 0

    def open_context(self, num_cells: int) -> Context:
        """An empty one."""
        return Context(self, num_cells)

    def new_context(self, num_cells: int, callback: Any) -> Any:
        """A context of llama.cpp's own."""
        params = self._api.llama_context_default_params()
        own = {
            "n_ctx": num_cells,
            "n_batch": BATCH,
            "n_ubatch": MICROBATCH,
            "n_seq_max": NUM_SEQUENCES,
            "n_threads": num_threads(),
            "n_threads_batch": num_threads(),
            "flash_attn_type": 0,
            "kv_unified": True,
            "swa_full": True,
            "cb_eval": callback,
            "no_perf": True,
        }
        given = dict(self._of_context)
        if "n_threads" in given:
            given.setdefault("n_threads_batch", given["n_threads"])
        given.pop("n_ctx", None)
        for name, value in (own | given).items():
            setattr(params, name, value)
        found, reason = heard(self._api.llama_init_from_model, self.pointer, params)
        if not found:
            raise SpecguardError(
                f"llama.cpp makes no context of {num_cells} tokens for {self.name}: "
                f"{reason or 'memory ran out'}",
                "fewer candidates (--k), fewer problems at a time, or a smaller model need less",
            )
        return found


def load_model(
    source: str, dtype: str = "auto", arguments: Mapping[str, str] | None = None
) -> LocalEngine:
    """An engine over a GGUF file, a folder or a downloaded hub repo with one.

    Raises:
        UsageError: llama.cpp has no such argument, it cannot have this value, or the file's numbers
            are of another type than ``dtype``.
        SpecguardError: the file is missing or broken, or llama.cpp cannot run it.
    """
    file = read_gguf(source)
    _check_dtype(file, dtype)
    arguments = arguments or {}
    model = Model(file, arguments)
    tokenizer = GGUFTokenizer(file, model)
    limit = min(file.context_limit, int(arguments.get("n_ctx", 0)) or file.context_limit)
    layer = LlamaLayer(model, max(tokenizer.vocabulary.values()) + 1)
    refusal = _capture_refusal(file, model) or _probe(layer, source)
    exact = _cache_type(file) == _FLOAT_TYPES["float32"]
    return LocalEngine(
        source, layer, tokenizer, limit, refusal, randomness_refusal=None if exact else _INEXACT
    )


def demand(source: str, dtype: str, arguments: Mapping[str, str]) -> Demand:
    """What a model will take: its file, keys and values, and the rows of logits in the making."""
    file = read_gguf(source)
    _check_dtype(file, dtype)
    of_model, of_context = parsed_arguments(arguments)
    rows = NUM_SEQUENCES + of_context.get("n_ubatch", MICROBATCH)
    logits = rows * _num_tokens(file) * 4
    per_token = _bytes_per_token(file, of_context)
    return Demand(source, _place(of_model), file.num_bytes + logits, per_token)


def num_threads() -> int:
    """Processor cores that this process may use, or OMP_NUM_THREADS."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    cores = psutil.cpu_count(logical=False) or 1
    try:
        return min(cores, len(psutil.Process().cpu_affinity()))
    except AttributeError:  # not on macOS
        return cores


def _num_tokens(file: GGUF) -> int:
    """Rows of the vocabulary, padding included."""
    embedding = file.tensors.get("token_embd.weight")
    return embedding.shape[-1] if embedding is not None else 0


def _place(of_model: Mapping[str, Any]) -> Place:
    """The memory that weights go to: of the first GPU, where llama.cpp was built for one."""
    api = library()
    if not api.llama_supports_gpu_offload() or of_model.get("n_gpu_layers") == 0:
        return this_machine()
    from llama_cpp._ggml import libggml

    find, memory = libggml.ggml_backend_dev_by_type, libggml.ggml_backend_dev_memory
    find.restype, memory.argtypes = ctypes.c_void_p, [ctypes.c_void_p] * 3
    device = find(1)
    if not device:
        return this_machine()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    memory(device, ctypes.addressof(free), ctypes.addressof(total))
    return Place("the GPU", free.value)


def _check_dtype(file: GGUF, dtype: str) -> None:
    if dtype == "auto":
        return
    if _main_type(file) != _FLOAT_TYPES.get(dtype):
        raise UsageError(
            f"the numbers of {file.name} are what they were written as, not {dtype}",
            "leave --dtype out, or choose another file",
        )


def _main_type(file: GGUF) -> int:
    """The type that most of the weights have."""
    counts: dict[int, int] = {}
    for tensor in file.tensors.values():
        counts[tensor.number_type] = counts.get(tensor.number_type, 0) + int(np.prod(tensor.shape))
    return max(counts, key=counts.__getitem__)


def _cache_type(file: GGUF) -> int:
    """Of keys and values: float32 beside weights in float32, else llama.cpp's own float16."""
    return 0 if _main_type(file) == _FLOAT_TYPES["float32"] else 1


def _bytes_per_token(file: GGUF, of_context: Mapping[str, Any]) -> int:
    sizes = []
    for name in ("type_k", "type_v"):
        number = of_context.get(name, _cache_type(file))
        sizes.append(_CACHE_BYTES.get(number, 1.1))
    return int(file.num_cached_numbers * sum(sizes) / 2)


def _refusal(api: Any, pointer: Any, file: GGUF) -> str:
    """Why a model cannot be run step by step, if it cannot."""
    if api.llama_model_is_recurrent(pointer) or api.llama_model_is_hybrid(pointer):
        return "keeps a state that cannot be cut back: a rejected step must leave no trace"
    if api.llama_model_has_encoder(pointer) or not api.llama_model_has_decoder(pointer):
        return "is no decoder: it writes no steps"
    if file.value("rope.scaling.type") == "longrope":
        return "scales positions by longrope, which llama.cpp does by the size of its cache"
    return ""


def _capture_refusal(file: GGUF, model: Model) -> str | None:
    """Why the columns of its attention are not all of the sequence's positions, or None."""
    if model.is_fused:
        return "flash attention keeps no weights: leave flash_attn_type out"
    if file.value("attn_logit_softcapping"):
        return f"{file.architecture} soft-caps its attention scores"
    if file.value("attention.sliding_window"):
        return f"{file.architecture} has sliding-window layers"
    return None


def _probe(layer: LlamaLayer, name: str) -> str | None:
    """Two candidates after two tokens: why attention cannot be read, if it cannot.

    Raises:
        SpecguardError: the model cannot be run step by step.
    """
    tree = np.array([[1, 0], [0, 1]], dtype=np.bool_)
    try:
        buffer = layer.new_buffer()
        layer.forward([Row(buffer, 0, 2, 0)], [0, 1], [0, 1], None)
        layer.forward([Row(buffer, 2, 2, 2, tree)], [1, 2], [2, 2], [0, 1])
    except SpecguardError as error:
        raise SpecguardError(
            f"{name} cannot be run step by step: {error.message}", error.hint
        ) from error
    captured = Capture(np.ones(2, dtype=np.bool_), num_layers=layer.num_layers)
    wanted = RowCapture(captured, [0, 1], [0, 1, 2])
    buffer = layer.new_buffer()
    layer.forward([Row(buffer, 0, 1, 0)], [0], [0], None)
    try:
        layer.forward([Row(buffer, 1, 2, 1, None, [wanted])], [1, 2], [1, 2], [0, 1])
    except (SpecguardError, KeyError) as error:
        return f"llama.cpp does not hand it out: {error}"
    return None

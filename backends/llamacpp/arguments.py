"""llama.cpp's own parameters, given by name."""

import ctypes
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from specguard.backends.llamacpp.library import library
from specguard.core.errors import UsageError

# What this backend decides, or options of ours decide.
_OURS = {
    "cb_eval",
    "ctx_type",
    "embeddings",
    "kv_unified",
    "n_batch",
    "n_outputs_max",
    "n_outputs_max_per_seq",
    "n_rs_seq",
    "n_seq_max",
    "no_alloc",
    "no_perf",
    "pooling_type",
    "attention_type",
    "swa_full",
    "vocab_only",
}
_SWITCHES = {"true": True, "false": False, "1": True, "0": False}


def parsed_arguments(arguments: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of parameters of llama.cpp's models, and of its contexts, by name.

    Raises:
        UsageError: there is no such parameter, it is not the user's, or it cannot have this value.
    """
    if not arguments:
        return {}, {}
    api = library()
    of_model, of_context = (
        {name: kind for name, kind in struct._fields_ if _is_plain(kind)}
        for struct in (api.llama_model_params, api.llama_context_params)
    )
    found: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, text in arguments.items():
        if name in _OURS:
            raise UsageError(f"--engine-arg {name}: this is set by specguard itself")
        kind = of_model.get(name) or of_context.get(name)
        if kind is None:
            nearest = get_close_matches(name, {*of_model, *of_context} - _OURS, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see docs/engines.md"
            raise UsageError(f"llama.cpp has no parameter {name!r}", hint)
        found[name not in of_model][name] = _value(api, name, kind, text)
    return found


def _is_plain(kind: Any) -> bool:
    return (
        isinstance(kind, type)
        and issubclass(kind, ctypes._SimpleCData)
        and kind not in (ctypes.c_void_p,)
    )


def _value(api: Any, name: str, kind: Any, text: str) -> Any:
    """A value in a parameter's type."""
    wrong = UsageError(f"--engine-arg {name}={text}: this is no value for it")
    if name in ("type_k", "type_v"):
        number = getattr(api, f"GGML_TYPE_{text.upper()}", None)
        if not isinstance(number, int):
            raise wrong
        return number
    if kind is ctypes.c_bool:
        if text.lower() not in _SWITCHES:
            raise wrong
        return _SWITCHES[text.lower()]
    try:
        value = float(text) if kind is ctypes.c_float else int(text)
    except ValueError:
        raise wrong from None
    if kind is not ctypes.c_float and kind(value).value != value:
        raise wrong
    return value

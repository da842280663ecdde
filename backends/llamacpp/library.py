"""llama.cpp's library: what it logs, and what it tells of the graph that it computes.

The layout of a tensor in memory is ggml's own; it is checked against ggml's functions once.
"""

import ctypes
import sys
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

from specguard.core.errors import SpecguardError

_NE, _OP, _SRC, _NAME = 16, 80, 152, 256  # offsets in a ggml_tensor
_ERROR, _CONTINUED = 4, 5
_NUM_OPS = 60  # to look among
_said: deque[str] = deque(maxlen=8)
_keep_alive: list[Any] = []


@cache
def library() -> Any:
    """The module of llama-cpp-python's low-level functions; from then on nothing is printed."""
    import llama_cpp

    is_error = False

    def hear(level: int, text: bytes, _: Any) -> None:
        nonlocal is_error
        is_error = level == _ERROR or (level == _CONTINUED and is_error)
        if is_error:
            _said.append(text.decode("utf-8", "replace").strip())

    callback = llama_cpp.llama_log_callback(hear)
    _keep_alive.append(callback)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def heard(call: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """A call's result, and the first error that llama.cpp logged meanwhile, or nothing."""
    _said.clear()
    result = call(*arguments)
    lines = [line for line in _said if line]
    # "function: what happened"; the first is the cause, others follow from it.
    return result, lines[0].partition(": ")[2] or lines[0] if lines else ""


@cache
def has_amx() -> bool:
    """Whether this build computes with Intel's AMX here."""
    library()
    from llama_cpp._ggml import libggml

    ask = getattr(libggml, "ggml_cpu_has_amx_int8", None)
    return bool(ask is not None and ask())


class Tensors:
    """Reads tensors of a graph by their addresses.

    Raises:
        SpecguardError: this build does not show them.
    """

    def __init__(self) -> None:
        library()
        from llama_cpp._ggml import libggml

        names = "ggml_backend_tensor_get", "ggml_op_name", "ggml_get_name"
        if not all(hasattr(libggml, name) for name in names):
            raise _unknown("hides what ggml computes")
        self._get = libggml.ggml_backend_tensor_get
        self._get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self._get.restype = None
        op_name = libggml.ggml_op_name
        op_name.argtypes, op_name.restype = [ctypes.c_int], ctypes.c_char_p
        self.set_rows = next(op for op in range(_NUM_OPS) if op_name(op) == b"SET_ROWS")
        self._get_name = libggml.ggml_get_name
        self._get_name.argtypes, self._get_name.restype = [ctypes.c_void_p], ctypes.c_void_p

    def check(self, tensor: int) -> None:
        """Whether a tensor's name lies where it is read."""
        if self._get_name(tensor) != tensor + _NAME:
            raise _unknown("lays tensors out in another way than the known one")

    def is_written(self, tensor: int) -> bool:
        """Whether rows are written by it into another tensor."""
        return ctypes.c_int32.from_address(tensor + _OP).value == self.set_rows

    @staticmethod
    def key(tensor: int) -> int:
        """The first eight letters of its name, see `key_of`; every node of a pass is asked."""
        return ctypes.c_uint64.from_address(tensor + _NAME).value

    @staticmethod
    def name(tensor: int) -> str:
        """How llama.cpp calls it."""
        return ctypes.string_at(tensor + _NAME).decode("utf-8", "replace")

    @staticmethod
    def source(tensor: int, index: int) -> int:
        """One of the tensors that it is computed from."""
        return ctypes.c_void_p.from_address(tensor + _SRC + 8 * index).value or 0

    @staticmethod
    def shape(tensor: int) -> tuple[int, ...]:
        """Numbers in each of four dimensions, the fastest first."""
        return tuple((ctypes.c_int64 * 4).from_address(tensor + _NE))

    def copy(self, tensor: int, array: Any) -> None:
        """Fill a contiguous array with the first bytes of a tensor."""
        self._get(tensor, array.ctypes.data, 0, array.nbytes)


def _unknown(what: str) -> SpecguardError:
    return SpecguardError(
        f"this build of llama.cpp {what}",
        "use a release of llama-cpp-python that has been run: see docs/engines.md",
    )


def key_of(name: str) -> int:
    """What `Tensors.key` gives for a name that begins so; eight letters."""
    return int.from_bytes(name.encode()[:8], sys.byteorder)

"""MLX in threads that end before the process does."""

import threading

import mlx.core as mx


class _Clearing:
    """Gives a thread's streams back when the thread ends.

    Compiled functions that another thread than the main one has used abort the process at its end,
    in about every second process, where that is left undone (MLX 0.32).
    """

    def __del__(self) -> None:
        mx.clear_streams()


_own = threading.local()


def clear_at_thread_end() -> None:
    """Tidy up after this thread, unless it is the main one."""
    if threading.current_thread() is not threading.main_thread() and not hasattr(_own, "clearing"):
        _own.clearing = _Clearing()

"""How much of a request vLLM may find in its cache.

A step that vLLM has drawn lies in the cache, and what is found there gives no rows when the step
is scored. So the search may not go beyond what stands before the step.
"""

from typing import Any


class PrefixLimit:
    """Bounds the search in one engine's cache. Used in the driver's thread alone."""

    def __init__(self, manager: Any) -> None:
        self._search = manager.get_computed_blocks
        self._block_size = int(manager.block_pool.hash_block_size)
        self._limits: dict[str, int] = {}
        manager.get_computed_blocks = self._find

    def begin(self, name: str, num_tokens: int) -> None:
        """A request may find its first ``num_tokens`` tokens, and no more."""
        self._limits[name] = num_tokens

    def end(self, name: str) -> None:
        """The request is over."""
        self._limits.pop(name, None)

    def _find(self, request: Any) -> Any:
        limit = self._limits.get(request.request_id)
        if limit is None:
            return self._search(request)
        hashes = request.block_hashes
        request.block_hashes = hashes[: limit // self._block_size]
        try:
            return self._search(request)
        finally:
            request.block_hashes = hashes  # the request's new blocks are filed under them


def make_limit(llm: Any) -> PrefixLimit | None:
    """A limit on an engine in this process; None where the cache is searched otherwise."""
    try:
        return PrefixLimit(llm.engine_core.engine_core.scheduler.kv_cache_manager)
    except AttributeError:
        return None

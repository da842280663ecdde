"""Who listens to a job that another thread does."""

import asyncio

from specguard.core.engine import OnTokens


class Listener:
    """Passes tokens on to a listener, in the event loop that waits for the job.

    ``error`` is what the listener has raised: it is the outcome of the job.
    """

    def __init__(self, on_tokens: OnTokens) -> None:
        self._on_tokens = on_tokens
        self._loop = asyncio.get_running_loop()
        self.error: Exception | None = None

    def tell(self, index: int, token_ids: tuple[int, ...]) -> None:
        """Pass new tokens of a candidate on, from any thread."""
        self._loop.call_soon_threadsafe(self._call, index, token_ids)

    def _call(self, index: int, token_ids: tuple[int, ...]) -> None:
        if self.error is None:
            try:
                self._on_tokens(index, token_ids)
            except Exception as error:
                self.error = error

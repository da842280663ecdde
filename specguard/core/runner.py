"""The synchronous face of coroutines.

A caller without a running event loop has the work done in its own thread. Inside a running one, as
in a notebook, another thread does it.
"""

import asyncio
import signal
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class Runner:
    """An event loop for as long as one piece of work takes; a context manager."""

    def __init__(self) -> None:
        with _interruptible():
            self._loop = asyncio.new_event_loop()
        self._pool: ThreadPoolExecutor | None = None

    def __del__(self) -> None:
        # Of one that was interrupted before it was entered, or as it was left.
        if hasattr(self, "_loop") and not (self._loop.is_running() or self._loop.is_closed()):
            self._loop.close()

    def __enter__(self) -> "Runner":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _interruptible():
            try:
                self.run(_end_tasks())
            finally:
                if self._pool is not None:
                    self._pool.shutdown()
                self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine; an interruption cancels it and all that it has begun."""
        if not _is_loop_running():
            return self._complete(work)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "specguard")
        future = self._pool.submit(self._complete, work)
        try:
            return future.result()
        except BaseException:
            if not future.done():  # this thread was interrupted, the other one goes on
                for task in asyncio.all_tasks(self._loop):
                    self._loop.call_soon_threadsafe(task.cancel)
            raise

    def _complete(self, work: Coroutine[Any, Any, T]) -> T:
        task = self._loop.create_task(work)
        with _interruptible(task):
            try:
                return self._loop.run_until_complete(task)
            except BaseException:
                self._loop.run_until_complete(_end_tasks())
                raise


@contextmanager
def _interruptible(task: asyncio.Task[Any] | None = None) -> Iterator[None]:
    """Let Ctrl-C cancel a task, and raise it when the block is left.

    Raised anywhere, it would leave the event loop half way. A second one, where the first has no
    effect, is raised at once. In other threads than the main one, and where somebody else handles
    interruptions, nothing changes.
    """
    interruptions: list[int] = []

    def interrupt(number: int, _frame: object) -> None:
        interruptions.append(number)
        if len(interruptions) > 1:
            raise KeyboardInterrupt
        if task is not None:
            task.get_loop().call_soon_threadsafe(task.cancel)

    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if is_ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except asyncio.CancelledError:
        if not interruptions:
            raise
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if interruptions:
        raise KeyboardInterrupt


def drain(items: AsyncGenerator[T]) -> Generator[T]:
    """The items of an asynchronous generator; closing this one closes it."""
    with Runner() as runner:
        try:
            while True:
                try:
                    item = runner.run(_next(items))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            runner.run(_close(items))


async def _end_tasks() -> None:
    """Cancel what is under way in the event loop, tasks of an engine's own included."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _close(items: AsyncGenerator[Any]) -> None:
    # An item asked for just as an interruption came would be begun beside the closing.
    await _end_tasks()
    await items.aclose()


async def _next(items: AsyncGenerator[T]) -> T:
    return await anext(items)


def _is_loop_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True

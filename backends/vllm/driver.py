"""The thread in which every vLLM engine of this process is made and computes.

vLLM keeps global state (the context of a forward pass, threads, process groups): several engines
can live in one process, and take turns. Knows no step and no candidate: a request is token ids,
vLLM's sampling parameters, and whoever reads what comes back.
"""

import atexit
import gc
import warnings
from asyncio import wrap_future
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

from specguard.core.errors import SpecguardError

T = TypeVar("T")

_PATIENCE = 10  # seconds that the end of the process waits for a pass


@dataclass(slots=True, eq=False)
class Request:
    """Token ids to go on from; ``read`` is told every output, until it says that it is done.

    ``begin`` is called with vLLM's own id before the first pass, ``end`` when all is over.
    """

    token_ids: Sequence[int]
    params: Any
    read: Callable[[Any], bool]
    begin: Callable[[str], None]
    end: Callable[[], None]


@dataclass(slots=True, eq=False)
class _Work:
    """Requests that are awaited together; ``names`` are vLLM's of those under way."""

    requests: Sequence[Request]
    future: Future[None]
    names: set[str]


class Driver:
    """One thread, its engines, and a queue of what to do between two passes."""

    def __init__(self) -> None:
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._handles: list[Handle] = []
        self._thread = Thread(target=self._run, name="specguard-vllm", daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    def post(self, action: Callable[[], None]) -> None:
        """Do something in the thread, when the pass under way is over."""
        self._inbox.put(action)

    def call(self, function: Callable[[], T]) -> T:
        """The result of a function that runs in the thread; its error is raised here."""
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self.post(work)
        return future.result()

    def make(self, build: Callable[[], Any]) -> "Handle":
        """An engine of vLLM's, built in the thread."""

        def work() -> Handle:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # vLLM's and its libraries' own
                handle = Handle(self, build())
            self._handles.append(handle)
            return handle

        return self.call(work)

    def drop(self, handle: "Handle") -> None:
        """End an engine and free its memory; does not wait for it."""
        self.post(lambda: self._drop(handle))

    def _drop(self, handle: "Handle") -> None:
        if handle in self._handles:
            self._handles.remove(handle)
            handle.close()
            gc.unfreeze()  # vLLM keeps what there was at its start from being collected
            gc.collect()

    def _run(self) -> None:
        while True:
            is_busy = any(handle.is_busy for handle in self._handles)
            try:
                while (action := self._inbox.get(block=not is_busy)) is not None:
                    action()
                    is_busy = True  # what else waits is taken without waiting for more
                for handle in self._handles:
                    handle.close()
                return
            except Empty:
                pass
            for handle in self._handles:
                handle.advance()

    def _stop(self) -> None:
        self._inbox.put(None)
        self._thread.join(_PATIENCE)


class Handle:
    """One of vLLM's engines. All but `run` happens in the driver's thread."""

    def __init__(self, driver: Driver, llm: Any) -> None:
        self._driver, self.llm = driver, llm
        self._running: dict[str, tuple[_Work, Request]] = {}
        self._num_begun = 0
        self._failure: str | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a pass has something to do."""
        return self._failure is None and bool(self.llm.has_unfinished_requests())

    async def run(self, requests: Sequence[Request]) -> None:
        """Wait until all requests are done; to cancel this ends them.

        Raises:
            SpecguardError: vLLM refuses one of them, or has failed.
        """
        work = _Work(requests, Future(), set())

        def look(future: Future[None]) -> None:
            if future.cancelled():
                self._driver.post(lambda: self._end(work))

        work.future.add_done_callback(look)
        self._driver.post(lambda: self._begin(work))
        await wrap_future(work.future)

    def _begin(self, work: _Work) -> None:
        if work.future.done():  # cancelled before it began
            return
        if self._failure is not None:
            _fail(work, self._failure)
            return
        try:
            for request in work.requests:
                self._num_begun += 1
                prompt = {"type": "token", "prompt_token_ids": list(request.token_ids)}
                name = f"specguard-{self._num_begun}"
                own = self.llm.add_request(name, prompt, request.params)
                self._running[name] = work, request
                work.names.add(name)
                request.begin(own)
        except Exception as error:
            self._end(work)
            _fail(work, f"vLLM refuses a request: {first_line(error)}")

    def advance(self) -> None:
        """One pass, and what it brings."""
        if not self.is_busy:
            return
        try:
            outputs = self.llm.step()
        except Exception as error:
            self._failure = f"vLLM has failed: {first_line(error)}"
            self._fail_all(self._failure)
            return
        done = [output.request_id for output in outputs if self._read(output)]
        if done:
            self.llm.abort_request(done)  # those that vLLM would go on with

    def _read(self, output: Any) -> bool:
        name = output.request_id
        if name not in self._running:  # its neighbour has failed in this pass
            return True
        work, request = self._running[name]
        try:
            is_done = request.read(output) or output.finished
        except Exception as error:
            self._end(work)
            _settle(work, error)
            return True
        if is_done:
            del self._running[name]
            work.names.discard(name)
            request.end()
            if not work.names:
                _settle(work)
        return is_done

    def _end(self, work: _Work) -> None:
        names = [name for name in work.names if name in self._running]
        for name in names:
            self._running.pop(name)[1].end()
        work.names.clear()
        if names and self._failure is None:
            self.llm.abort_request(names)

    def _fail_all(self, message: str) -> None:
        for work, _ in list(self._running.values()):
            _fail(work, message)
        self._running.clear()

    def close(self) -> None:
        """Free what the engine holds."""
        self._fail_all("the engine has been closed")
        client, self.llm, self._failure = self.llm.engine_core, None, "the engine has been closed"
        # Its own way to end would take down the process groups, which other engines need.
        client._finalizer.detach()
        client.engine_core.model_executor.shutdown()
        client.engine_core.scheduler.shutdown()


def _settle(work: _Work, error: BaseException | None = None) -> None:
    try:
        if error is None:
            work.future.set_result(None)
        else:
            work.future.set_exception(error)
    except InvalidStateError:
        pass  # nobody waits any longer


def _fail(work: _Work, message: str) -> None:
    _settle(work, SpecguardError(message))


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_lock = Lock()
_drivers: list[Driver] = []


def driver() -> Driver:
    """The driver of this process."""
    with _lock:
        if not _drivers:
            _drivers.append(Driver())
        return _drivers[0]

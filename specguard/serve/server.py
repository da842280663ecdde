"""The server as a process: it listens, and stops when it is told to."""

import asyncio
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import uvicorn

from specguard.core.errors import SpecguardError, UsageError
from specguard.core.solver import Solver
from specguard.serve.app import guarded
from specguard.serve.limits import Limits
from specguard.serve.metrics import Metrics
from specguard.serve.service import Service
from specguard.serve.worker import Worker

_BACKLOG = 2048


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens.

    ``keys`` are API keys; without any it listens to this machine alone. Pages of ``origins`` may
    use it from a browser.

    Raises:
        UsageError: another address than this machine's own, and no key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Sequence[str] = ()
    origins: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not (self.is_local or self.keys):
            raise UsageError(
                f"without an API key nobody else is served, and {self.host} is open to others",
                "give --api-key-file, or leave --host out",
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """The names by which it may be asked for; None: any, where a key is needed."""
        return None if self.keys else ("localhost", "127.0.0.1", "::1", self.host)

    def bind(self) -> socket.socket:
        """A socket that has the address, and does not listen yet.

        Raises:
            SpecguardError: the address cannot be had.
        """
        try:
            kind = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0][0]
            opened = socket.socket(kind, socket.SOCK_STREAM)
        except OSError as error:
            raise SpecguardError(f"{self.host} is no address to listen at: {error}") from error
        try:
            if sys.platform != "win32":
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind((self.host, self.port))
        except OSError as error:
            opened.close()
            raise self._taken(error) from error
        return opened

    def listen(self, bound: socket.socket) -> str:
        """Listen; the URL.

        Raises:
            SpecguardError: somebody else does by now.
        """
        try:
            bound.listen(_BACKLOG)
        except OSError as error:
            raise self._taken(error) from error
        host, port = bound.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def _taken(self, error: OSError) -> SpecguardError:
        return SpecguardError(
            f"{self.host}:{self.port} cannot be listened at: {error.strerror}",
            "choose another --port; 0 takes any that is free",
        )


def read_keys(file: Path) -> tuple[str, ...]:
    """API keys, a line each; lines that begin with # are none.

    Raises:
        UsageError: the file cannot be read, or holds no key.
    """
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not valid UTF-8"
        raise UsageError(f"{file} cannot be read: {reason}") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise UsageError(f"{file} holds no API key", "write one to a line")
    return keys


def serve(
    solver: Solver,
    name: str,
    address: Address,
    bound: socket.socket,
    limits: Limits,
    *,
    check: Callable[[str], None] | None = None,
    is_forced: bool = False,
    logs_prompts: bool = False,
    begun: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; what is under way then is finished first.

    Args:
        solver: what solves.
        name: what clients call it.
        address: where to listen.
        bound: what `Address.bind` gave, before the models were loaded: so that nobody waits for
            them in vain.
        limits: of what is taken on.
        check: refuses a problem that the pair was not made for.
        is_forced: takes such problems all the same.
        logs_prompts: whether the log says what was asked.
        begun: called with the server's URL once it listens.

    Raises:
        SpecguardError: the address cannot be had.
    """
    metrics = Metrics()
    with Worker(solver, limits, metrics) as worker:
        service = Service(solver, worker, limits, name, check, is_forced, logs_prompts)
        app = guarded(
            service, metrics, keys=address.keys, hosts=address.hosts, origins=address.origins
        )
        config = uvicorn.Config(
            app,
            access_log=False,
            log_config=None,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=round(limits.drain_seconds),
        )
        server = uvicorn.Server(config)
        with _stopped_by_signals(server):
            url = address.listen(bound)
            if begun is not None:
                begun(url)
            asyncio.run(server.serve(sockets=[bound]))


@contextmanager
def _stopped_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """Signals end the server, and not the process around it: it has an exit code of its own.

    The server's own handlers are there from its start to its end; these take what comes before,
    when others know already that it listens, and what it raises again afterwards.
    """

    def stop(*_: object) -> None:
        server.should_exit = True

    is_main = threading.current_thread() is threading.main_thread()
    before = {}
    if is_main:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class LogHandler(logging.StreamHandler[Any]):
    """Writes lines as long as they can be written."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - its name
        """A full disk is no reason to serve nobody."""


def log_to_stderr() -> None:
    """Show what is logged; where it cannot be written, requests are served all the same."""
    handler = LogHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name, level in (("specguard", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False

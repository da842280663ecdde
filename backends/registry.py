"""Backends by name. Importing this module imports no framework; choosing a backend does."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Protocol, cast, runtime_checkable

from specguard.backends.checkpoint import is_gguf, is_url
from specguard.backends.memory import Demand, ModelSize
from specguard.core.engine import Engine
from specguard.core.errors import SpecguardError, UsageError

ENTRY_POINT_GROUP = "specguard.backends"
AUTO = "auto"
GGUF_BACKEND = "llamacpp"
URL_BACKEND = "http"
# Name to "module:attribute"; the attribute is a `Backend`, its module imports no framework.
BUILT_IN: Mapping[str, str] = {
    "mlx": "specguard.backends.mlx.backend:MLX",
    "cuda": "specguard.backends.pytorch.backend:CUDA",
    "mps": "specguard.backends.pytorch.backend:MPS",
    "cpu": "specguard.backends.pytorch.backend:CPU",
    "vllm": "specguard.backends.vllm.backend:VLLM",
    "llamacpp": "specguard.backends.llamacpp.backend:LLAMACPP",
    "http": "specguard.backends.http.backend:HTTP",
}


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """Whether a backend works here; if not, why and what to do."""

    name: str
    is_usable: bool
    device: str = ""
    version: str = ""
    memory_bytes: int | None = None
    reason: str = ""
    hint: str = ""


class Backend(Protocol):
    """What a registered backend offers."""

    @property
    def weights(self) -> str:
        """Which of a pair's checkpoints it loads: ``torch``, ``mlx`` or ``gguf``."""

    def status(self) -> BackendStatus:
        """Whether it works here, found out without loading a model."""

    def load(
        self,
        source: str,
        dtype: str,
        trust_remote_code: bool,
        device: str | None,
        is_headless: bool = False,
    ) -> Engine:
        """Load a folder or a downloaded hub id; ``device`` is what followed the name, if anything.

        ``is_headless`` loads the layers alone, for a reward model: hidden states are right and
        log-probabilities mean nothing. Code that comes with the model is not run then.

        Raises:
            SpecguardError: it cannot be loaded; the message says why.
        """


@runtime_checkable
class MeasuredBackend(Backend, Protocol):
    """A backend that says what a model will take: what does not fit is refused beforehand."""

    def demand(self, source: str, dtype: str, device: str | None) -> Demand:
        """What loading a model will take, and of which memory; arguments as in `load`.

        Raises:
            SpecguardError: the model is missing or broken, or there is no such device.
        """


@runtime_checkable
class TunableBackend(Backend, Protocol):
    """A backend whose engine has arguments of its own."""

    def with_arguments(self, arguments: Mapping[str, str]) -> Backend:
        """The same backend with these, by name; `load` refuses those that the engine lacks."""


@runtime_checkable
class RoundingBackend(Backend, Protocol):
    """A backend that may round the weights of a draft, where nobody chooses its number type."""

    def draft_dtype(self, source: str) -> str:
        """What a draft is best loaded as.

        Raises:
            SpecguardError: the model is missing or broken.
        """


@runtime_checkable
class EstimatedBackend(Backend, Protocol):
    """A backend that says so of a model that is still to be downloaded, by its size."""

    def estimate(self, size: ModelSize, device: str | None) -> Demand:
        """What one of a pair's checkpoints would take, loaded with dtype "auto".

        Raises:
            SpecguardError: there is no such device.
        """


def backend_names() -> tuple[str, ...]:
    """Names of all registered backends, third parties' included."""
    return tuple(BUILT_IN) + tuple(
        entry.name for entry in entry_points(group=ENTRY_POINT_GROUP) if entry.name not in BUILT_IN
    )


def find_backend(name: str) -> Backend:
    """The backend called ``name``, usable or not.

    Raises:
        UsageError: no backend has this name; the nearest one is suggested.
    """
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        backend: Backend = getattr(import_module(module), attribute)
        return backend
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == name:
            return cast(Backend, entry.load())
    known = (AUTO, *backend_names())
    nearest = get_close_matches(name, known, 1, 0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise UsageError(f"no backend is called {name!r}", f"{hint}backends: {', '.join(known)}")


def automatic_backend() -> str | None:
    """What ``auto`` takes: the first usable one of those that suit this machine, if any."""
    return next((name for name in _auto_order() if find_backend(name).status().is_usable), None)


def choose_backend(name: str) -> tuple[str, Backend, str | None]:
    """A usable backend for ``auto``, a name, or a name with a device number (``cuda:1``).

    ``auto`` takes MLX on Apple silicon, CUDA where there is a GPU, else the CPU; and MLX's own CPU
    build where there is no torch.

    Returns:
        The backend's name, the backend, and the device that followed the name.

    Raises:
        UsageError: no backend has this name.
        SpecguardError: it is not usable here; says what to install.
    """
    if name.startswith(f"{AUTO}:"):
        raise UsageError("'auto' takes no device number", "name the backend: cuda:1")
    if name == AUTO:
        name = automatic_backend() or "cpu"
    base, _, number = name.partition(":")
    if number and not number.isdigit():
        raise UsageError(f"no backend is called {name!r}", "a device is a number: cuda:1")
    backend = find_backend(base)
    status = backend.status()
    if not status.is_usable:
        raise SpecguardError(f"backend {base!r} cannot be used: {status.reason}", status.hint)
    return base, backend, name if number else None


def backend_for(source: str | None, wanted: str) -> str:
    """The backend that a model asks for, where ``auto`` is wanted; else the wanted one.

    What is behind a URL runs there, whatever is wanted for the other model.

    Raises:
        UsageError: the model is of a kind that another backend than the wanted one reads.
    """
    if source is not None and is_url(source):
        return URL_BACKEND
    if source is None or not is_gguf(source):
        return wanted
    if wanted == AUTO:
        return GGUF_BACKEND
    if wanted in BUILT_IN and wanted != GGUF_BACKEND:
        raise UsageError(
            f"{source} is a GGUF file, which the backend {wanted!r} does not read",
            f"leave --backend out, or choose {GGUF_BACKEND}; --draft-backend is the draft's own",
        )
    return wanted


def arguments_by_role(
    arguments: Mapping[str, str], backends: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """Arguments of each role's engine.

    Args:
        arguments: by name, ``name`` for every engine that takes any, ``role.name`` for one.
        backends: names of backends, by role.

    Raises:
        UsageError: an engine that takes none is given one.
    """
    found: dict[str, dict[str, str]] = {role: {} for role in backends}
    if not arguments:
        return found
    takers = {
        role
        for role, name in backends.items()
        if isinstance(choose_backend(name)[1], TunableBackend)
    }
    for given, value in arguments.items():
        role, dot, name = given.partition(".")
        roles = {role} & backends.keys() if dot else takers
        if not roles or not roles <= takers:
            whose = f"the {role}'s engine" if dot else "the backend " + backends_named(backends)
            raise UsageError(
                f"{whose} takes no engine arguments: {given}",
                "--backend vllm and llamacpp do, and a URL's",
            )
        for each in roles:
            found[each][name if dot else given] = value
    return found


def backends_named(backends: Mapping[str, str]) -> str:
    """Their names, each once."""
    return " and ".join(dict.fromkeys(backends.values()))


def _auto_order() -> tuple[str, ...]:
    is_apple_silicon = platform.system() == "Darwin" and platform.machine() == "arm64"
    return ("mlx", "cpu") if is_apple_silicon else ("cuda", "cpu", "mlx")

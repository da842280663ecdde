"""The registered backend of servers; httpx is imported when a model is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec

from specguard.backends.registry import Backend, BackendStatus
from specguard.core.engine import Engine
from specguard.core.errors import SpecguardError, UsageError


@dataclass(frozen=True, slots=True)
class HttpBackend:
    """Models behind servers, whose sources are URLs."""

    name: str = "http"
    weights: str = "torch"
    arguments: Mapping[str, str] = field(default_factory=dict)

    def status(self) -> BackendStatus:
        """Whether httpx is installed; whether a server is there shows when it is asked."""
        if find_spec("httpx") is None:
            return BackendStatus(
                self.name,
                False,
                reason="httpx is not installed",
                hint="pip install 'specguard[http]'",
            )
        return BackendStatus(self.name, True, "servers", f"httpx {version('httpx')}")

    def with_arguments(self, arguments: Mapping[str, str]) -> Backend:
        """The same with the name of a model, or a tokenizer."""
        return replace(self, arguments={**self.arguments, **arguments})

    def load(
        self,
        source: str,
        dtype: str,
        trust_remote_code: bool,
        device: str | None,
        is_headless: bool = False,
    ) -> Engine:
        """An engine over the servers of ``source``, URLs with commas between."""
        if device is not None:
            raise UsageError("backend 'http' takes no device number: the server has its own")
        if is_headless:
            raise SpecguardError(
                "servers hand out no hidden states: none can run a reward model",
                "choose another backend for it",
            )
        if dtype != "auto":
            raise SpecguardError(
                f"{source} computes in what its server was started with, not in {dtype}",
                "leave --dtype out; --draft-dtype is the draft's alone",
            )
        from specguard.backends.http.loading import load_model

        return load_model(source, self.arguments, trust_remote_code)


HTTP = HttpBackend()

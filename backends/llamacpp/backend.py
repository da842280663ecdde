"""The registered llama.cpp backend; its library is imported when a status is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec

from specguard.backends.memory import Demand
from specguard.backends.registry import Backend, BackendStatus
from specguard.core.engine import Engine
from specguard.core.errors import SpecguardError, UsageError


@dataclass(frozen=True, slots=True)
class LlamaBackend:
    """llama.cpp in this process, with parameters of its own."""

    name: str = "llamacpp"
    weights: str = "gguf"
    arguments: Mapping[str, str] = field(default_factory=dict)

    def status(self) -> BackendStatus:
        """Whether llama-cpp-python is installed and its library can be loaded."""
        hint = "pip install 'specguard[llamacpp]'"
        if find_spec("llama_cpp") is None:
            reason = "llama-cpp-python is not installed"
            return BackendStatus(self.name, False, reason=reason, hint=hint)
        found = f"llama-cpp-python {version('llama-cpp-python')}"
        try:
            from specguard.backends.llamacpp.library import library

            api = library()
        except (ImportError, OSError, RuntimeError) as error:
            reason = (
                f"llama.cpp cannot be loaded: {(str(error).strip() or 'no reason').splitlines()[0]}"
            )
            return BackendStatus(self.name, False, version=found, reason=reason, hint=hint)
        import psutil

        from specguard.backends.llamacpp.loading import num_threads

        device = f"{num_threads()} threads"
        if api.llama_supports_gpu_offload():
            device = "GPU"
        return BackendStatus(self.name, True, device, found, psutil.virtual_memory().total)

    def with_arguments(self, arguments: Mapping[str, str]) -> Backend:
        """The same with parameters of llama.cpp, by name."""
        return replace(self, arguments={**self.arguments, **arguments})

    def demand(self, source: str, dtype: str, device: str | None) -> Demand:
        """What a model will take of the memory."""
        self._check_device(device)
        from specguard.backends.llamacpp.loading import demand

        return demand(source, dtype, self.arguments)

    def load(
        self,
        source: str,
        dtype: str,
        trust_remote_code: bool,
        device: str | None,
        is_headless: bool = False,
    ) -> Engine:
        """Load a GGUF file."""
        self._check_device(device)
        if is_headless:
            raise SpecguardError(
                "llama.cpp runs no reward model of the known kind", "choose another backend for it"
            )
        from specguard.backends.llamacpp.loading import load_model

        return load_model(source, dtype, self.arguments)

    def _check_device(self, device: str | None) -> None:
        if device is not None:
            raise UsageError(
                f"backend {self.name!r} takes no device number",
                "choose one by --engine-arg main_gpu=N with split_mode=0",
            )


LLAMACPP = LlamaBackend()

"""The registered vLLM backend; vLLM is imported when a model is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec

from specguard.backends.memory import Demand
from specguard.backends.registry import Backend, BackendStatus
from specguard.backends.vllm.loading import SUPPORTED, installed_version, is_supported
from specguard.core.engine import Engine
from specguard.core.errors import SpecguardError, UsageError

_RELEASE = ".".join(map(str, SUPPORTED))


@dataclass(frozen=True, slots=True)
class VLLMBackend:
    """vLLM in this process, with arguments for its engine."""

    name: str = "vllm"
    weights: str = "torch"
    arguments: Mapping[str, str] = field(default_factory=dict)

    def status(self) -> BackendStatus:
        """Whether a release that can be used is installed."""
        found = installed_version()
        if found is None or find_spec("vllm") is None:
            return BackendStatus(
                self.name,
                False,
                reason="vllm is not installed",
                hint="pip install 'specguard[vllm]', on Linux",
            )
        if not is_supported(found):
            return BackendStatus(
                self.name,
                False,
                version=f"vllm {found}",
                reason=f"vllm {found} has not been tried: it is used from the inside",
                hint=f"pip install 'vllm=={_RELEASE}.*'",
            )
        import psutil
        import torch

        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            device, memory = properties.name, properties.total_memory
            reason = "attention is captured with --engine-arg enforce_eager=true alone"
        else:
            device, memory = f"{torch.get_num_threads()} threads", psutil.virtual_memory().total
            reason = ""
        return BackendStatus(self.name, True, device, f"vllm {found}", memory, reason)

    def with_arguments(self, arguments: Mapping[str, str]) -> Backend:
        """The same with arguments of vLLM's engine, by name."""
        return replace(self, arguments={**self.arguments, **arguments})

    def demand(self, source: str, dtype: str, device: str | None) -> Demand:
        """What a model will take of the memory."""
        self._check_device(device)
        from specguard.backends.vllm.loading import demand

        return demand(source, dtype)

    def load(
        self,
        source: str,
        dtype: str,
        trust_remote_code: bool,
        device: str | None,
        is_headless: bool = False,
    ) -> Engine:
        """Load a model into vLLM."""
        self._check_device(device)
        if is_headless:
            raise SpecguardError(
                "vLLM hands out no hidden states: it cannot run a reward model",
                "choose another backend for it",
            )
        from specguard.backends.vllm.loading import load_model

        engine: Engine = load_model(source, dtype, trust_remote_code, self.arguments)
        return engine

    def _check_device(self, device: str | None) -> None:
        if device is not None:
            raise UsageError(
                f"backend {self.name!r} takes no device number",
                "choose one by CUDA_VISIBLE_DEVICES",
            )


VLLM = VLLMBackend()

"""The registered torch backends; torch is imported when one is asked for its status."""

from dataclasses import dataclass
from importlib.util import find_spec

from specguard.backends.memory import Demand, ModelSize
from specguard.backends.registry import BackendStatus
from specguard.core.engine import Engine
from specguard.core.errors import UsageError

_INSTALL = "pip install 'specguard[torch]'"


@dataclass(frozen=True, slots=True)
class TorchBackend:
    """One kind of torch device."""

    name: str
    weights: str = "torch"

    def status(self) -> BackendStatus:
        """Whether torch and transformers are installed and the device is there."""
        for package in ("torch", "transformers"):
            if find_spec(package) is None:
                return BackendStatus(
                    self.name, False, reason=f"{package} is not installed", hint=_INSTALL
                )
        import psutil
        import torch

        version = f"torch {torch.__version__}"
        if self.name == "cuda":
            if not torch.cuda.is_available():
                hint = "a CUDA build of torch and an NVIDIA driver are needed, or --backend cpu"
                return BackendStatus(
                    self.name, False, version=version, reason="no CUDA GPU was found", hint=hint
                )
            properties = torch.cuda.get_device_properties(0)
            return BackendStatus(self.name, True, properties.name, version, properties.total_memory)
        if self.name == "mps" and not torch.backends.mps.is_available():
            return BackendStatus(
                self.name,
                False,
                version=version,
                reason="no Metal GPU was found",
                hint="MPS needs a Mac; choose --backend cpu",
            )
        device = f"{torch.get_num_threads()} threads" if self.name == "cpu" else "Metal GPU"
        return BackendStatus(self.name, True, device, version, psutil.virtual_memory().total)

    def demand(self, source: str, dtype: str, device: str | None) -> Demand:
        """What a model will take of the device's memory."""
        self._check_device(device)
        from specguard.backends.pytorch.loading import demand

        return demand(source, device or self.name, dtype)

    def estimate(self, size: ModelSize, device: str | None) -> Demand:
        """What a model in bfloat16 would take of the device's memory."""
        self._check_device(device)
        from specguard.backends.pytorch.loading import estimate

        return estimate(size, device or self.name)

    def draft_dtype(self, source: str) -> str:
        """Weights of 4 bits where they are known to pay, "auto" elsewhere."""
        from specguard.backends.pytorch.loading import draft_dtype

        return draft_dtype(source) if self.name == "cpu" else "auto"

    def load(
        self,
        source: str,
        dtype: str,
        trust_remote_code: bool,
        device: str | None,
        is_headless: bool = False,
    ) -> Engine:
        """Load a model onto this backend's device."""
        self._check_device(device)
        from specguard.backends.pytorch.loading import load_model

        return load_model(source, device or self.name, dtype, trust_remote_code, is_headless)

    def _check_device(self, device: str | None) -> None:
        if device is not None and self.name != "cuda":
            raise UsageError(f"backend {self.name!r} has one device: leave the number out")


CPU, CUDA, MPS = TorchBackend("cpu"), TorchBackend("cuda"), TorchBackend("mps")

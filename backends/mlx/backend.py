"""The registered MLX backend; mlx is imported when its status is asked for, mlx-lm to load."""

import platform
from importlib.metadata import version
from importlib.util import find_spec

from specguard.backends.memory import Demand, ModelSize
from specguard.backends.registry import BackendStatus
from specguard.core.engine import Engine
from specguard.core.errors import UsageError


class MlxBackend:
    """MLX on its default device: the GPU of a Mac, else the CPU."""

    name = "mlx"
    weights = "mlx"

    def status(self) -> BackendStatus:
        """Whether mlx and mlx-lm are installed and mlx can be imported here."""
        system, machine = platform.system(), platform.machine()
        if system not in ("Linux", "Darwin") or (system, machine) == ("Darwin", "x86_64"):
            return BackendStatus(
                self.name,
                False,
                reason=f"MLX runs on Apple silicon and Linux, and this is {system} on {machine}",
                hint="choose --backend cpu or cuda",
            )
        for package in ("mlx", "mlx_lm"):
            if find_spec(package) is None:
                return self._not_usable(f"{package} is not installed")
        try:
            import mlx.core as mx
        except ImportError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            return self._not_usable(f"mlx cannot be imported: {reason}")
        import psutil

        info = mx.device_info()
        kind = "GPU" if mx.default_device() == mx.gpu else "CPU"
        return BackendStatus(
            self.name,
            True,
            f"{info.get('device_name', kind)} ({kind})",
            f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}",
            int(info.get("memory_size", 0)) or psutil.virtual_memory().total,
        )

    def demand(self, source: str, dtype: str, device: str | None) -> Demand:
        """What a model will take of this machine's memory."""
        self._check_device(device)
        from specguard.backends.mlx.loading import demand

        return demand(source, dtype)

    def estimate(self, size: ModelSize, device: str | None) -> Demand:
        """What a model of 4 bits would take of this machine's memory."""
        self._check_device(device)
        from specguard.backends.mlx.loading import estimate

        return estimate(size)

    def load(
        self,
        source: str,
        dtype: str,
        trust_remote_code: bool,
        device: str | None,
        is_headless: bool = False,
    ) -> Engine:
        """Load a model onto MLX's default device."""
        self._check_device(device)
        from specguard.backends.mlx.loading import load_model

        return load_model(source, dtype, trust_remote_code, is_headless)

    def _check_device(self, device: str | None) -> None:
        if device is not None:
            raise UsageError("backend 'mlx' has one device: leave the number out")

    def _not_usable(self, reason: str) -> BackendStatus:
        hint = "pip install 'specguard[mlx]'"
        return BackendStatus(self.name, False, reason=reason, hint=hint)


MLX = MlxBackend()

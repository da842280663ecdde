"""The PyTorch backend: CUDA, MPS and CPU."""

from specguard.backends.pytorch.loading import load_model
from specguard.backends.pytorch.model import TorchModel
from specguard.backends.pytorch.sequence import TorchSequence

__all__ = ["TorchModel", "TorchSequence", "load_model"]

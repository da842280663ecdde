"""The PyTorch backend: CUDA, MPS and CPU.

Importing this package imports no framework: `specguard.backends.pytorch.loading` does.
"""

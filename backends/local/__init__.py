"""Engines in this process: one driver, which a layer of tensors (torch, MLX) computes for."""

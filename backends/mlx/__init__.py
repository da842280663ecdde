"""The MLX backend: Apple silicon through Metal, and MLX's CPU build.

Importing this package imports no framework: `specguard.backends.mlx.loading` does.
"""

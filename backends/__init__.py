"""Backends: implementations of `specguard.core.Engine`, registered by name."""

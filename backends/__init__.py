"""Backends: implementations of `specguard.core.LanguageModel`, registered by name."""

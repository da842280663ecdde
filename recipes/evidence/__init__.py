"""Measurements on the built-in pair: ``python -m recipes.evidence --help``."""

"""Measurements on the built-in pair: ``python -m specguard.models.tiny.evidence --help``."""

"""The built-in pair's process reward model: ``python -m specguard.models.tiny.prm --help``."""

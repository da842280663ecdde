"""The built-in pair's process reward model: ``python -m recipes.reward --help``."""

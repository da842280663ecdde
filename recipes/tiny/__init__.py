"""The draft and the target: ``python -m recipes.tiny.train --help``, ``.evaluate``, ``.export``."""

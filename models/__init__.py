"""Model pairs: the built-in one, presets of hub checkpoints, and the user's choice."""

"""Model pairs: the built-in one, families of hub models, and the user's choice."""

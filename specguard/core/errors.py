"""The errors that a caller is expected to handle: what happened, and a hint on what to do."""


class SpecguardError(Exception):
    """Something outside the code is wrong: a missing folder, an unusable model."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(SpecguardError, ValueError):
    """An argument or option has a value that can never work."""

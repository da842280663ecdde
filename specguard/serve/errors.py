"""What goes wrong, as clients of the protocol expect to be told."""

from collections.abc import Mapping
from typing import Any

from specguard.core.errors import SpecguardError, UsageError

INVALID, SERVER = "invalid_request_error", "server_error"


class ApiError(Exception):
    """An answer other than the one asked for: its status, and the error in the protocol's form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        # What cannot be encoded would spoil the answer that says so.
        shown = message.encode(errors="backslashreplace").decode()
        self.body: dict[str, Any] = {
            "error": {"message": shown, "type": kind, "param": param, "code": code}
        }

    @classmethod
    def of(cls, error: SpecguardError) -> "ApiError":
        """Of an error that is to be expected: of the request, or of an engine that failed."""
        message = f"{error.message} ({error.hint})" if error.hint else error.message
        if isinstance(error, UsageError):
            return cls(400, message)
        return cls(503, message, kind=SERVER, code="engine_error")


def internal_error() -> ApiError:
    """A defect: what it was stands in the log, and is none of the client's business."""
    return ApiError(500, "the server failed; its log says why", kind=SERVER)

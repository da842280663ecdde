"""A sequence of a built-in backend: token ids and the buffer that holds their KV."""

from collections.abc import Sequence
from typing import Generic, Protocol, Self, TypeVar


class SharedBuffer(Protocol):
    """Keys and values that several sequences may read and one may write."""

    def share(self) -> Self:
        """The same columns for one more sequence."""

    def release(self) -> None:
        """One sequence fewer reads the columns."""

    def own(self, length: int) -> Self:
        """A buffer that one sequence alone may write, with the first ``length`` columns."""


B = TypeVar("B", bound=SharedBuffer)


class BufferedSequence(Generic[B]):
    """Token ids and their KV: all but the last token, which is pending."""

    def __init__(self, token_ids: list[int], buffer: B) -> None:
        self.token_ids = token_ids
        self.version = 0  # grows with every change; what was proposed before it is stale
        self._buffer: B | None = buffer

    @property
    def is_closed(self) -> bool:
        """Whether the KV has been given back."""
        return self._buffer is None

    @property
    def num_cached(self) -> int:
        """Columns of the buffer that hold this sequence."""
        return len(self.token_ids) - 1

    def fork(self) -> Self:
        """An independent sequence; the columns are shared until one of the two writes."""
        return type(self)(list(self.token_ids), self.readable().share())

    def close(self) -> None:
        """Give the KV back."""
        if self._buffer is not None:
            self._buffer.release()
            self._buffer = None

    def readable(self) -> B:
        """The buffer, for reading the cached columns."""
        if self._buffer is None:
            raise ValueError("the sequence is closed")
        return self._buffer

    def writable(self) -> B:
        """The buffer, for this sequence alone."""
        self._buffer = self.readable().own(self.num_cached)
        return self._buffer

    def append(self, token_ids: Sequence[int]) -> None:
        """Take tokens in; their columns, the last one's apart, are in the buffer already."""
        self.token_ids.extend(token_ids)
        self.version += 1

    def truncate(self, length: int) -> None:
        """Drop the tokens from ``length`` on; their columns are overwritten in time."""
        del self.token_ids[length:]
        self.version += 1

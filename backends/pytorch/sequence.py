"""A sequence of the torch backend: token ids and the buffer that holds their KV."""

from collections.abc import Sequence

from specguard.backends.pytorch.kv import KVBuffer


class TorchSequence:
    """Token ids and their KV: all but the last token, which is pending."""

    def __init__(self, token_ids: list[int], buffer: KVBuffer) -> None:
        self.token_ids = token_ids
        self.version = 0  # grows with every change; what was proposed before it is stale
        self._buffer: KVBuffer | None = buffer

    @property
    def is_closed(self) -> bool:
        """Whether the KV has been given back."""
        return self._buffer is None

    @property
    def num_cached(self) -> int:
        """Columns of the buffer that hold this sequence."""
        return len(self.token_ids) - 1

    def fork(self) -> "TorchSequence":
        """An independent sequence; the buffer is shared until one of the two writes."""
        buffer = self._open_buffer()
        buffer.num_users += 1
        return TorchSequence(list(self.token_ids), buffer)

    def close(self) -> None:
        """Give the KV back."""
        if self._buffer is not None:
            self._buffer.num_users -= 1
            self._buffer = None

    def readable(self) -> KVBuffer:
        """The buffer, for reading the cached columns."""
        return self._open_buffer()

    def writable(self) -> KVBuffer:
        """The buffer, for this sequence alone."""
        buffer = self._open_buffer()
        if buffer.num_users > 1:
            buffer.num_users -= 1
            buffer = self._buffer = buffer.copy(self.num_cached)
        return buffer

    def append(self, token_ids: Sequence[int]) -> None:
        """Take tokens in; their columns, the last one's apart, are in the buffer already."""
        self.token_ids.extend(token_ids)
        self.version += 1

    def truncate(self, length: int) -> None:
        """Drop the tokens from ``length`` on; their columns are overwritten in time."""
        del self.token_ids[length:]
        self.version += 1

    def _open_buffer(self) -> KVBuffer:
        if self._buffer is None:
            raise ValueError("the sequence is closed")
        return self._buffer

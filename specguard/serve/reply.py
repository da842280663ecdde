"""The text that a client gets of a solution: as it becomes certain, up to where it is to stop."""

from collections.abc import Sequence

from specguard.core.records import StepRecord
from specguard.serve.tools import OPENING, ToolCall, has_call, looks_like_call, split_calls


class Reply:
    """Takes what is certain of a text, and gives what may be sent of it.

    What may yet turn out to be a stop sequence, or is a call of one of ``tools``, is held back:
    nothing that was given is ever taken back. ``text`` is all that the client gets.
    """

    def __init__(self, stop: Sequence[str] = (), tools: frozenset[str] = frozenset()) -> None:
        self._stop, self._tools = tuple(filter(None, stop)), tools
        self._num_given = 0
        self._step = ""  # what was certain of the step in hand before it was decided
        self.text = ""
        self.num_early = 0  # tokens of that
        self.is_stopped = False
        self.calls: list[ToolCall] = []

    def tokens(self, text: str, num_tokens: int) -> str:
        """Tokens of the step in hand that will stand in it."""
        self._step += text
        self.num_early += num_tokens
        return self._take(text)

    def step(self, step: StepRecord) -> str:
        """A step is decided; a call of a tool in it ends the turn."""
        assert step.text.startswith(self._step), "what was sent of a step is no part of it"
        rest, self._step, self.num_early = step.text[len(self._step) :], "", 0
        new = self._take(rest)
        self.is_stopped = self.is_stopped or has_call(self.text, self._tools)
        return new

    def finish(self) -> str:
        """What was held back to no purpose; afterwards ``calls`` are known."""
        if self._tools:
            rest, self.calls = split_calls(self.text, self._tools)
            if self.calls:
                rest = rest if len(rest) > self._num_given else self.text[: self._num_given]
                self.text = rest
        new = self.text[self._num_given :]
        self._num_given = len(self.text)
        return new

    def _take(self, new: str) -> str:
        if self.is_stopped:
            return ""
        # A stop sequence may have begun in what is there already.
        start = max(0, len(self.text) - max(map(len, self._stop), default=0))
        self.text += new
        # The one that was complete first counts, however the text is cut into pieces.
        found = [
            (place + len(stop), place)
            for stop in self._stop
            if (place := self.text.find(stop, start)) >= 0
        ]
        if found:
            self.text = self.text[: min(found)[1]]
            self.is_stopped = True
        sure = len(self.text) if self.is_stopped else self._num_sure()
        if self._tools:
            sure = self._before_calls(sure)
        given = self.text[self._num_given : sure]
        self._num_given = max(self._num_given, sure)
        return given

    def _num_sure(self) -> int:
        return min(
            (_without_beginning(self.text, stop) for stop in self._stop), default=len(self.text)
        )

    def _before_calls(self, sure: int) -> int:
        if looks_like_call(self.text):
            return 0
        place = self.text.find(OPENING)
        sure = min(sure, _without_beginning(self.text, OPENING))
        return sure if place < 0 else min(sure, place)


def _without_beginning(text: str, sequence: str) -> int:
    """The length of a text without what may be the beginning of a sequence, at its end."""
    for length in range(min(len(text), len(sequence) - 1), 0, -1):
        if text.endswith(sequence[:length]):
            return len(text) - length
    return len(text)

"""What an observer is told while a problem is solved: phases as they begin, tokens as they come.

Knows nothing of engines: a job carries the listener that is made here.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from specguard.core.config import Author
from specguard.core.engine import Candidate
from specguard.core.records import Phase

_INCOMPLETE = "\ufffd"  # how a part of a character reads


@dataclass(frozen=True, slots=True)
class PhaseBegan:
    """A phase of the step with this index has begun; a step may have the same phase twice."""

    step: int
    phase: Phase


@dataclass(frozen=True, slots=True)
class TokensDrawn:
    """A model has new tokens for a candidate of the step in hand.

    What the target writes is candidate 0 of ``author`` "target"; what it keeps of a rejected step
    comes first, all at once. ``text`` is what the tokens add to the candidate's text, in whole
    characters: one that is incomplete comes with the tokens that complete it.
    """

    step: int
    author: Author
    candidate: int
    token_ids: tuple[int, ...]
    text: str


Progress = PhaseBegan | TokensDrawn
Observer = Callable[[Progress], None]
Decode = Callable[[Sequence[int]], str]


class Announcer:
    """Tells an observer about one problem; without one it does nothing.

    ``begin_step`` has to be called for every step but the first. What the observer raises comes out
    of whatever was going on. Tokens are told of ``authors`` alone.
    """

    def __init__(
        self,
        observer: Observer | None,
        decode: Decode,
        authors: Collection[Author] = ("draft", "target"),
    ) -> None:
        self._observer, self._decode, self._authors = observer, decode, authors
        self._step = 0
        self._cut_ids: tuple[int, ...] = ()
        self._texts: dict[tuple[Author, int], TextStream] = {}

    def begin_step(self, step: int, cut_ids: Sequence[int]) -> None:
        """What follows is of this step; ``cut_ids`` are tokens of steps that were cut before it."""
        self._step, self._cut_ids = step, tuple(cut_ids)
        self._texts.clear()

    def phase(self, phase: Phase) -> None:
        """A phase has begun."""
        if self._observer is not None:
            self._observer(PhaseBegan(self._step, phase))

    def tokens(self, author: Author, candidate: int, token_ids: Sequence[int]) -> None:
        """New tokens of a candidate."""
        if self._observer is None or author not in self._authors or not token_ids:
            return
        stream = self._texts.get((author, candidate))
        if stream is None:
            stream = self._texts[author, candidate] = TextStream(self._decode)
            stream.feed(self._cut_ids)
        text = stream.feed(token_ids)
        self._observer(TokensDrawn(self._step, author, candidate, tuple(token_ids), text))

    def listener(self, author: Author, first_candidate: int = 0) -> "Listener | None":
        """What a job is to call with its candidates' tokens; None where nobody listens."""
        if self._observer is None or author not in self._authors:
            return None
        return Listener(self, author, first_candidate)


class Listener:
    """Hands a job's tokens on, and afterwards those that the engine did not tell of."""

    def __init__(self, announcer: Announcer, author: Author, first_candidate: int) -> None:
        self._announcer, self._author, self._first = announcer, author, first_candidate
        self._num_told: Counter[int] = Counter()

    def __call__(self, candidate: int, token_ids: tuple[int, ...]) -> None:
        """New tokens of a candidate, by its index in the job."""
        self._num_told[candidate] += len(token_ids)
        self._announcer.tokens(self._author, self._first + candidate, token_ids)

    def finish(self, candidates: Sequence[Candidate]) -> None:
        """The job is done."""
        for index, candidate in enumerate(candidates):
            self(index, candidate.token_ids[self._num_told[index] :])


class TextStream:
    """Tokens to text, piece by piece: all pieces together are what the tokens decode to.

    A part of a character at the end is held back until it is complete.
    """

    __slots__ = ("_decode", "_num_given", "_token_ids")

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._token_ids: list[int] = []  # those that are still looked at
        self._num_given = 0  # characters of their text

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens add."""
        self._token_ids += token_ids
        text = self._decode(self._token_ids)
        whole = text.rstrip(_INCOMPLETE)
        new = whole[self._num_given :]
        self._num_given = max(self._num_given, len(whole))
        if len(whole) == len(text) > 0:
            # How a token reads depends on the one before it at most.
            self._token_ids = self._token_ids[-1:]
            self._num_given = len(self._decode(self._token_ids))
        return new

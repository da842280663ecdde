"""Where a step ends, what the final answer is, and when a text goes round in circles."""

import re
from collections.abc import Callable, Hashable, Sequence

from specguard.core.engine import Boundary, CandidateFinish, Tokenizer

THINK, END_THINK = "<think>", "</think>"
_BOX = "\\boxed{"
_OPENING = re.compile(rf"\s*{THINK}")
_FENCE = re.compile(r"^ {0,3}(?:```|~~~)", re.MULTILINE)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is a character, not a group


class StepScanner:
    """Reads a step token by token and says when it ends.

    The delimiter may span tokens or end inside one: the step then ends with that token.
    """

    __slots__ = ("_boundary", "_has_text", "_num_tokens", "_piece", "_tail")

    def __init__(self, piece: Callable[[int], str], boundary: Boundary) -> None:
        self._piece = piece
        self._boundary = boundary
        self._tail = ""
        self._has_text = False
        self._num_tokens = 0
        for token_id in boundary.begun:
            self._completes_delimiter(piece(token_id))

    def feed(self, token_id: int) -> CandidateFinish | None:
        """How the step ends with this token, or None where it goes on."""
        boundary = self._boundary
        self._num_tokens += 1
        if token_id in boundary.eos_ids:
            return "eos"
        if boundary.delimiter and self._completes_delimiter(self._piece(token_id)):
            return "delimiter"
        return "length" if self._num_tokens >= boundary.max_tokens else None

    def _completes_delimiter(self, piece: str) -> bool:
        window = self._tail + piece
        if not self._has_text:
            # Blank text before the first word is no step: a delimiter there does not count.
            window = window.lstrip()
            self._has_text = bool(window)
        delimiter = self._boundary.delimiter
        self._tail = window[max(0, len(window) - len(delimiter) + 1) :]
        return delimiter in window


class PieceTable:
    """Text of single tokens as they read in the middle of a text, decoded once each."""

    __slots__ = ("_anchor", "_anchor_text", "_decode", "_pieces")

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Some decoders strip the space of a first token, hence a token in front.
        self._decode = tokenizer.decode
        self._anchor = tokenizer.encode("a")[-1]
        self._anchor_text = tokenizer.decode([self._anchor])
        self._pieces: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        """The token's text; a part of a multi-byte character reads as U+FFFD."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._decode([self._anchor, token_id])[len(self._anchor_text) :]
            self._pieces[token_id] = piece
        return piece


def final_answer(text: str) -> str | None:
    r"""Content of the last balanced ``\boxed{...}``, nested braces included, or None.

    An empty box, as prompts ask for one and models repeat it, is no answer.
    """
    start = text.rfind(_BOX)
    while start >= 0:
        depth = 1
        for brace in _BRACE.finditer(text, start + len(_BOX)):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                content = text[start + len(_BOX) : brace.start()].strip()
                if content:
                    return content
                break
        start = text.rfind(_BOX, 0, start)
    return None


def last_paragraph(text: str) -> str | None:
    """What stands behind the last blank line, without the blanks around it; None for no text."""
    return re.split(r"\n\s*\n", text.strip())[-1].strip() or None


def opens_code_block(text: str, is_open: bool = False) -> bool:
    """Whether a fenced block of code is open behind a text; ``is_open``: one was before it."""
    return is_open != bool(len(_FENCE.findall(text)) % 2)


def after_thinking(text: str) -> str | None:
    """What follows the thinking that a text begins with; None while that lasts.

    All of a text that begins otherwise.
    """
    if not _OPENING.match(text):
        return text
    _, end, rest = text.partition(END_THINK)
    return rest if end else None


def loop_length(items: Sequence[Hashable], max_period: int, num_rounds: int) -> int:
    """How many items at the end repeat themselves, with a period up to ``max_period``.

    0 where they do so fewer than ``num_rounds`` times.
    """
    longest = 0
    for period in range(1, max_period + 1):
        if period * num_rounds > len(items):
            break
        length = period
        while length < len(items) and items[-length - 1] == items[period - length - 1]:
            length += 1
        if length >= period * num_rounds:
            longest = max(longest, length)
    return longest

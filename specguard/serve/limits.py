"""How much the server takes on."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Of solutions: at a time, waiting, in bytes of keys and values, in seconds each.

    Text of a step in hand is sent every ``piece_seconds``. A solution gives its place to others
    that wait after ``turn_tokens``; ``body_bytes`` is the size of a request's body, ``choices`` how
    many answers one request may ask for, and ``drain_seconds`` how long those under way may take
    once the server is told to stop.
    """

    running: int = 8
    waiting: int = 64
    memory: int | None = None
    seconds: float = 600.0
    turn_tokens: int = 256
    piece_seconds: float = 0.02
    body_bytes: int = 4 * 2**20
    body_seconds: float = 30.0
    choices: int = 16
    drain_seconds: float = 30.0

"""The words that the problems are made of, read from ``language.json``.

Names and things come in three lists that share nothing, one for each use of the problems.
"""

import json
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# One stream of problems per use, so that no problem is seen in training and reported on.
TRAINING, CALIBRATION, HELD_OUT = 1, 2, 3
_USES = {TRAINING: "training", CALIBRATION: "calibration", HELD_OUT: "held_out"}
# One in so many successions of two phrasings is kept out of training.
_HELD_OUT_SHARE = 8


@dataclass(frozen=True, slots=True)
class Language:
    """Words and sentence templates; ``{a}`` and ``{b}`` are actors, ``{t}`` the things counted."""

    names: tuple[str, ...]
    things: tuple[str, ...]
    goods: tuple[str, ...]
    links: tuple[str, ...]
    facts: tuple[str, ...]
    pair_facts: tuple[str, ...]
    phrasings: dict[str, tuple[str, ...]]
    distractors: tuple[str, ...]
    questions: dict[str, tuple[str, ...]]


@cache
def language(stream: int) -> Language:
    """The words that problems of ``stream`` use."""
    data = json.loads((Path(__file__).parent / "language.json").read_text(encoding="utf-8"))
    use = _USES[stream]
    return Language(
        names=tuple(data["names"][use]),
        things=tuple(data["things"][use]),
        phrasings={kind: tuple(texts) for kind, texts in data["phrasings"].items()},
        questions={kind: tuple(texts) for kind, texts in data["questions"].items()},
        **{key: tuple(data[key]) for key in ("goods", "links", "facts", "pair_facts")},
        distractors=tuple(data["distractors"]),
    )


@cache
def is_held_out(first: str, second: str) -> bool:
    """Whether two event phrasings in a row are kept out of training."""
    return zlib.crc32(f"{first}|{second}".encode()) % _HELD_OUT_SHARE == 0

"""Ways to save time that compute a solution otherwise, and the switch that turns each of them off.

``SPECGUARD_WITHOUT=lean,tree`` in the environment does without these two, ``SPECGUARD_WITHOUT=all``
without any: where a result is in doubt, it must come out the same but for rounding. Models look at
``lean`` when they are loaded, everything else is looked at when it is about to be used.
(``beginning`` makes a rewrite cheaper, which the fallback to plain decoding takes into account:
compare without it.)
"""

import os
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from specguard.core.errors import UsageError

VARIABLE = "SPECGUARD_WITHOUT"
SHORTCUTS: Mapping[str, str] = MappingProxyType(
    {
        "lean": "passes of a Llama or Qwen2 on a CPU without transformers' layers around them",
        "tree": "candidates with the same tokens so far are forwarded once (torch)",
        "only-choice": "nothing is drawn where top-p leaves one token (torch, CPU)",
        "compiled": "what is done with the logits is compiled (MLX)",
        "beginning": "a rewrite keeps what the target would have written anyway",
        "joining": "problems of a batch join and leave the draft call that is under way",
    }
)


def uses(name: str) -> bool:
    """Whether a shortcut is taken.

    Raises:
        UsageError: the variable names something else.
    """
    return name not in _without(os.environ.get(VARIABLE, ""))


def check_switches() -> None:
    """Refuse a variable that names something else.

    Raises:
        UsageError: it does.
    """
    _without(os.environ.get(VARIABLE, ""))


@lru_cache
def _without(names: str) -> frozenset[str]:
    found = frozenset(name.strip() for name in names.split(",") if name.strip())
    if unknown := found - {*SHORTCUTS, "all"}:
        raise UsageError(
            f"{VARIABLE} names what is no shortcut: {', '.join(sorted(unknown))}",
            f"shortcuts: {', '.join(SHORTCUTS)}; or all",
        )
    return frozenset(SHORTCUTS) if "all" in found else found

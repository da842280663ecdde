"""The switch that makes everything be computed the plain way, without shortcuts.

``SPECGUARD_REFERENCE=1`` in the environment: no fused layers, no compiled functions, a candidate
never shares a pass with another, a rewrite keeps nothing of what it replaces. Where a result is in
doubt, it must come out the same but for rounding. Engines look at it when they are loaded, the rest
when it is about to be used. (A rewrite that keeps a beginning is cheaper, which the fallback to
plain decoding takes into account: compare without the fallback.)
"""

import os

from specguard.core.errors import UsageError

VARIABLE = "SPECGUARD_REFERENCE"


def is_reference() -> bool:
    """Whether shortcuts are off.

    Raises:
        UsageError: the variable is something else than 0 or 1.
    """
    value = os.environ.get(VARIABLE, "0")
    if value not in ("0", "1", ""):
        raise UsageError(f"{VARIABLE} must be 0 or 1, not {value!r}")
    return value == "1"

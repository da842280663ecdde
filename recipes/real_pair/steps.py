"""What a step is, how many a position gets, and the seeds of all that is drawn. Knows no engine."""

import hashlib
from collections.abc import Callable, Sequence

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
DELIMITER = "\n\n"
NUM_SAMPLED = 8
# Of a label, what stands beside its signals, too.
LABEL_FIELDS = (
    "problem",
    "step",
    "kind",
    "right",
    "outcomes",
    "method",
    "same_as_own",
    "first_pick",
    "multiplicity",
    "text",
    "finish",
    "token_ids",
)


def cut_steps(
    decode: Callable[[Sequence[int]], str], token_ids: Sequence[int]
) -> list[tuple[int, int]]:
    """[start, end) token ranges; a step ends with the token that completes a delimiter.

    What follows the last delimiter, an EOS token included, is the last step.
    """
    ranges, start = [], 0
    for end in range(1, len(token_ids) + 1):
        if DELIMITER in decode(token_ids[start:end]):
            ranges.append((start, end))
            start = end
    if start < len(token_ids):
        ranges.append((start, len(token_ids)))
    return ranges


def seed_of(*parts: object) -> int:
    """A seed that depends on what is drawn, not on when."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF

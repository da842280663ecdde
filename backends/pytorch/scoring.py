"""The layout of a scoring pass: several continuations behind one prefix, as a tree.

Tokens that continuations have in common at the beginning are forwarded once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specguard.core.model import BoolArray
from specguard.core.shortcuts import uses


@dataclass(frozen=True, slots=True)
class Tree:
    """One row's queries: the pending token, then what follows it, but for each one's last token.

    ``places`` are, for each continuation, where among the queries its tokens are predicted;
    ``visible`` [queries, queries] is True where a query may look.
    """

    tokens: list[int]
    positions: list[int]
    places: list[list[int]]
    visible: BoolArray

    @classmethod
    def of(cls, pending: int, num_cached: int, continuations: Sequence[Sequence[int]]) -> "Tree":
        """The tree behind a sequence's cached columns and its pending token.

        Without the shortcut, continuations share that token alone.
        """
        is_merged = uses("tree")
        tokens, positions, places = [pending], [num_cached], []
        known: dict[tuple[int, ...], int] = {}  # place of a token behind a place
        for number, token_ids in enumerate(continuations):
            path = [0]
            for token_id in token_ids[:-1]:
                key = (path[-1], token_id) if is_merged else (path[-1], token_id, number)
                if key not in known:
                    known[key] = len(tokens)
                    tokens.append(token_id)
                    positions.append(num_cached + len(path))
                path.append(known[key])
            places.append(path)
        visible = np.eye(len(tokens), dtype=np.bool_)
        for path in places:
            for depth, place in enumerate(path):
                visible[place, path[:depth]] = True
        return cls(tokens, positions, places, visible)

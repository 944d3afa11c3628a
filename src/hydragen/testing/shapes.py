"""Trees, and where rows end in them, from lists of integers: whoever draws the integers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

# One number decides all of them: drawn one by one, Hypothesis likes to repeat the same choice.
STYLES = list(
    itertools.product(
        ("any", "star", "roots", "chain"),  # the tree
        ("any", "each", "leaves", "crowd"),  # where rows end
        ("", "", "", "", "", "", "root", "path"),  # what is empty on the path of row 0
        ("as drawn", "one", "uniform", "heads"),  # queries per row
    )
)


def tree_parents(codes: Sequence[int], topology: str) -> list[int]:
    """Any tree; one prefix under everything; one path; sequences that share nothing."""
    if topology == "star":
        return [-1, *[0] * (len(codes) - 1)]
    if topology == "chain":
        return list(range(-1, len(codes) - 1))
    if topology == "roots":
        return [-1] * len(codes)
    return [code % (node + 1) - 1 for node, code in enumerate(codes)]


def row_ends(codes: Sequence[int], parents: Sequence[int], ends: str) -> list[int]:
    """Rows that end anywhere; at any leaves; nearly all at one node; each at a leaf of its own."""
    ends_of_tree = leaves(parents)
    if ends == "leaves":
        return [ends_of_tree[code % len(ends_of_tree)] for code in codes]
    if ends == "crowd":
        # A huge group and a tiny one: all at one node but the last row, which ends at another.
        crowded, others = codes[0] % len(parents), len(parents) - 1
        away = (crowded + 1 + codes[-1] % max(others, 1)) % len(parents)
        return [*[crowded] * (len(codes) - 1), away]
    if ends == "each":
        return ends_of_tree[: len(codes)]
    return [code % len(parents) for code in codes]


def leaves(parents: Sequence[int]) -> list[int]:
    """Nodes without children."""
    return sorted(set(range(len(parents))) - set(parents))


def hollow_out(kv_lens: list[int], parents: Sequence[int], end: int, hollow: str) -> None:
    """Empty the first segment on the path to a node, or the whole path: a row with nothing to attend to."""
    node = end
    while node >= 0 and hollow:
        if hollow == "path" or parents[node] < 0:
            kv_lens[node] = 0
        node = parents[node]

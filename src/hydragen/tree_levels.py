"""A tree stated level by level, turned into one stated node by node."""

from __future__ import annotations

import numpy as np

from hydragen.host_ints import IntArray, as_int_vector
from hydragen.tree_checks import check_not_negative, listed


def stack_levels(kv_lens: object, parents: object | None = None) -> tuple[IntArray, IntArray]:
    """Number the nodes level by level and return their parents and lengths.

    Parameters
    ----------
    kv_lens : one vector of integers per level
        Tokens in each node of the level.
    parents : one vector of integers, or None, per level, optional
        For each node of the level its parent's position within the level above. None: equal groups.

    Returns
    -------
    parents, kv_lens : int64 [num_nodes]

    Raises
    ------
    TypeError, ValueError
        If an entry is not a vector of integers, or the levels do not fit each other.
    """
    vectors = "vectors of integers, one per level"
    lengths = [as_int_vector(x, f"kv_lens[{i}]") for i, x in enumerate(listed(kv_lens, "kv_lens", vectors))]
    for level, in_level in enumerate(lengths):
        check_not_negative(in_level, f"kv_lens[{level}]")
    links = [None] * len(lengths) if parents is None else listed(parents, "parents", vectors)
    if len(links) != len(lengths):
        raise ValueError(
            f"parents must hold one entry per level, {len(lengths)} as kv_lens has, got {len(links)}; "
            "give None for level 0 and for levels of equal groups"
        )
    if links and links[0] is not None:
        raise ValueError(
            f"parents[0] must be None because the nodes of level 0 are roots, got {links[0]!r}; "
            "give the parents of level 1 as parents[1]"
        )
    indices = [np.full(in_level.size, -1) for in_level in lengths[:1]]
    first_above = 0
    for level in range(1, len(lengths)):
        num_above = lengths[level - 1].size
        indices.append(first_above + _level_parents(level, lengths[level].size, num_above, links[level]))
        first_above += num_above
    none = np.empty(0, dtype=np.int64)
    return np.concatenate([none, *indices]), np.concatenate([none, *lengths])


def _level_parents(level: int, num_nodes: int, num_above: int, parents: object | None) -> IntArray:
    """Return the parent of each node of a level, as its position within the level above."""
    name = f"parents[{level}]"
    if parents is None:
        if num_nodes > 0 and (num_above == 0 or num_nodes % num_above != 0):
            raise ValueError(
                f"kv_lens[{level}] must hold a multiple of the {num_above} nodes of the level above, got "
                f"{num_nodes}; give {name}, the position of each node's parent within the level above"
            )
        return np.arange(num_nodes) // max(1, num_nodes // max(1, num_above))
    links = as_int_vector(parents, name)
    if links.size != num_nodes:
        raise ValueError(
            f"{name} must hold one parent per node, {num_nodes} as kv_lens[{level}] has, got {links.size}; "
            "give the position of each node's parent within the level above"
        )
    bad = np.flatnonzero((links < 0) | (links >= num_above))
    if bad.size:
        raise ValueError(
            f"{name}[{bad[0]}] must be the position of one of the {num_above} nodes of level {level - 1}, "
            f"counted from 0, got {links[bad[0]]}; positions start anew in every level"
        )
    return links

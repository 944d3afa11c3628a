"""What the arrays of a prefix tree must fulfil."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from hydragen.host_ints import IntArray


def check_tree(
    parents: IntArray, kv_lens: IntArray | None, row_to_node: IntArray, token_ids: IntArray | None
) -> None:
    """Raise ValueError unless the arrays describe a tree.

    Parameters
    ----------
    parents : int64 [num_nodes]
        Each must be -1 or an earlier node; this also rules out cycles.
    kv_lens : int64 [num_nodes] or None
    row_to_node : int64 [num_rows]
    token_ids : int64 [sum(kv_lens)] or None
    """
    num_nodes = parents.size
    bad = np.flatnonzero((parents < -1) | (parents >= np.arange(num_nodes)))
    if bad.size:
        raise ValueError(
            f"parents[{bad[0]}] must be -1 (a root) or the index of an earlier node, got {parents[bad[0]]}; "
            "number the nodes so that parents come before their children"
        )
    bad = np.flatnonzero((row_to_node < 0) | (row_to_node >= num_nodes))
    if bad.size:
        raise ValueError(
            f"row_to_node[{bad[0]}] must be the index of one of the {num_nodes} nodes, counted from 0, got "
            f"{row_to_node[bad[0]]}; name the node at which the row ends"
        )
    if kv_lens is not None:
        if kv_lens.size != num_nodes:
            raise ValueError(
                f"kv_lens must hold one length per node, {num_nodes} as parents has, got {kv_lens.size}; "
                "give the number of tokens of every node"
            )
        check_not_negative(kv_lens, "kv_lens")
        copied = float(kv_lens.sum(dtype=np.float64)) * max(row_to_node.size, 1)
        if copied >= 2**62:
            raise ValueError(
                f"kv_lens must hold fewer than 2**62 tokens, copied for every row, got {copied:.3g}; "
                "give the number of tokens of every node"
            )
    if token_ids is not None:
        expected = known(kv_lens, "token_ids").sum()
        if token_ids.size != expected:
            raise ValueError(
                f"token_ids must hold sum(kv_lens) = {expected} tokens, got {token_ids.size}; "
                "give the tokens of all nodes end to end"
            )


def check_not_negative(lengths: IntArray, name: str) -> None:
    """Raise ValueError unless every length is at least 0."""
    bad = np.flatnonzero(lengths < 0)
    if bad.size:
        raise ValueError(
            f"{name}[{bad[0]}] must be at least 0, got {lengths[bad[0]]}; "
            "give the number of tokens of the node"
        )


def known(kv_lens: IntArray | None, needed_for: str) -> IntArray:
    """Return `kv_lens`; raise ValueError if the tree does not know them."""
    if kv_lens is None:
        raise ValueError(
            f"{needed_for} needs the lengths of the nodes, got a tree with kv_lens=None; "
            "give kv_lens when making the tree"
        )
    return kv_lens


def listed(value: object, name: str, of: str) -> list[object]:
    """Return the entries of an iterable; `of` says what they should be."""
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        try:
            return list(value)
        except TypeError:  # arrays and tensors are iterable by name, even those without dimensions
            pass
    raise TypeError(f"{name} must be a list of {of}, got {type(value).__name__}; wrap a single one in a list")

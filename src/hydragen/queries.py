"""Whose queries: the shape of a token's heads, and the query tokens in tree order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hydragen.host_ints import IntArray
from hydragen.ragged import offsets
from hydragen.tree import PrefixTree


@dataclass(frozen=True)
class Heads:
    """Shape of one token's queries, keys and values, and the bytes of one element."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    itemsize: int

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads


@dataclass(frozen=True, eq=False)
class Queries:
    """The query tokens in tree order, so that those that share a segment are side by side.

    Attributes
    ----------
    begin, end : int64 [num_nodes]
        Half-open range of the tokens whose path contains each node.
    token : int64 [num_tokens]
        Where the caller put the token: its index in packed q, or row * q_len + i.
    row : int64 [num_tokens]
        The token's row in the caller's numbering.
    within : int64 [num_tokens]
        The token's index among those of its row.
    q_lens : int64 [num_rows]
        Query tokens of each row, in the caller's numbering; capacities where the lengths live on the device.
    in_order : bool
        `token` is 0, 1, 2, ...
    """

    begin: IntArray
    end: IntArray
    token: IntArray
    row: IntArray
    within: IntArray
    q_lens: IntArray
    in_order: bool

    @classmethod
    def of(cls, tree: PrefixTree, q_starts: IntArray, q_lens: IntArray) -> Queries:
        """Lay out the tokens of rows that begin at `q_starts` and have `q_lens` tokens (int64 [num_rows])."""
        order = tree.row_order
        lens = q_lens[order]
        first = offsets(lens)
        row, index = order.repeat(lens), np.arange(first[-1])
        within = index - first[:-1].repeat(lens)
        token = q_starts[row] + within
        in_order = bool((token == index).all())
        return cls(first[tree.row_begin], first[tree.row_end], token, row, within, q_lens, in_order)

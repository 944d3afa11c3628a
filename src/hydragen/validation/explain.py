"""Argument errors of `hydragen.explain`."""

from __future__ import annotations

import numbers

import torch

from hydragen.host_ints import IntArray, as_positive_int
from hydragen.tree import PrefixTree

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_explain(
    tree: PrefixTree,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    head_dim_v: int,
    dtype: torch.dtype,
    q_len: int,
) -> IntArray:
    """Return the tree's lengths if the arguments of `explain` fit together."""
    if not isinstance(tree, PrefixTree):
        raise TypeError(
            f"tree must be a hydragen.PrefixTree, got {type(tree).__name__}; "
            "make one with PrefixTree.from_levels"
        )
    if tree.kv_lens is None:
        raise ValueError("tree must know its lengths, got kv_lens=None; pass kv_lens when making the tree")
    as_positive_int(q_len, "q_len")
    for name, heads in (("num_q_heads", num_q_heads), ("num_kv_heads", num_kv_heads)):
        as_positive_int(heads, name)
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"num_q_heads must be a multiple of num_kv_heads, got {num_q_heads} and {num_kv_heads}; "
            "every KV head serves equally many query heads"
        )
    for name, dim in (("head_dim", head_dim), ("head_dim_v", head_dim_v)):
        if isinstance(dim, bool) or not isinstance(dim, numbers.Integral) or not 1 <= dim <= 256:
            raise ValueError(
                f"{name} must be an integer from 1 to 256, got {dim!r}; larger heads are not supported"
            )
    if dtype not in _DTYPES:
        names = ", ".join(str(known) for known in _DTYPES)
        raise TypeError(f"dtype must be one of {names}, got {dtype!r}; it is that of q, k and v")
    return tree.kv_lens

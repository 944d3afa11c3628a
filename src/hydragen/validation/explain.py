"""Argument errors of `hydragen.explain`."""

from __future__ import annotations

import numbers

import torch

from hydragen.host_ints import IntArray, as_positive_int
from hydragen.queries import Heads
from hydragen.tree import PrefixTree
from hydragen.validation.queries import check_num_queries, check_num_vectors
from hydragen.validation.tensors import shown

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_explain(
    tree: PrefixTree,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    head_dim_v: int,
    dtype: torch.dtype,
    q_len: int,
) -> tuple[IntArray, Heads, int]:
    """Return the tree's lengths, the heads and q_len, as Python's integers, if the arguments fit together."""
    if not isinstance(tree, PrefixTree):
        raise TypeError(
            f"tree must be a hydragen.PrefixTree, got {type(tree).__name__}; "
            "make one with PrefixTree.from_levels"
        )
    if tree.kv_lens is None:
        raise ValueError("tree must know its lengths, got kv_lens=None; pass kv_lens when making the tree")
    for name, count in (("num_q_heads", num_q_heads), ("num_kv_heads", num_kv_heads), ("q_len", q_len)):
        if as_positive_int(count, name) != count or isinstance(count, torch.Tensor):
            raise TypeError(f"{name} must be an integer, got {shown(count)}; convert it with int()")
    check_num_queries(tree.num_rows, int(q_len), "q_len")
    check_num_vectors(tree.num_rows * int(q_len), int(num_q_heads))
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
    if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES:
        names = ", ".join(str(known) for known in _DTYPES)
        raise TypeError(f"dtype must be one of {names}, got {shown(dtype)}; it is that of q, k and v")
    heads = Heads(int(num_q_heads), int(num_kv_heads), int(head_dim), int(head_dim_v), dtype.itemsize)
    return tree.kv_lens, heads, int(q_len)


def check_cuda(device: object) -> torch.device:
    """Return the CUDA device of this machine that `device` names."""
    remedy = "leave it out for an H200"
    try:
        found: torch.device = torch.device(device)  # type: ignore[call-overload]  # whatever was given
    except (RuntimeError, TypeError, ValueError, OverflowError):  # the last two: numbers beyond int64
        raise ValueError(
            f"device must name a CUDA device, such as 'cuda:0', got {shown(device)}; {remedy}"
        ) from None
    there = torch.cuda.device_count()
    if found.type != "cuda" or (found.index or 0) >= there:
        raise ValueError(
            f"device must be a CUDA device of this machine, which has {there}, got {str(found)!r}; {remedy}"
        )
    return found

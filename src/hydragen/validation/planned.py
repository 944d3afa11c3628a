"""Argument errors of `hydragen.plan` and of the runs of a plan."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hydragen.host_ints import IntArray, as_positive_int, frozen
from hydragen.kv import KV, NodeKV, PackedKV, PagedKV, strides_of
from hydragen.lengths import on_device
from hydragen.queries import Heads
from hydragen.transforms import lasting_memory
from hydragen.tree import PrefixTree
from hydragen.validation.kv import check_kv
from hydragen.validation.queries import (
    Rows,
    as_max,
    check_device_offsets,
    check_num_queries,
    check_num_vectors,
    check_offset_values,
    check_offsets,
    equal_rows,
)
from hydragen.validation.tables import Tables, tables_of, tensors_of
from hydragen.validation.tensors import check_tensor, kind, shown

# Tables of a million times the work: far beyond any use, and nothing that numbers cannot count.
_MOST_RESERVE = 1e6


class Planned(NamedTuple):
    """What a plan is made for, checked.

    Attributes
    ----------
    tree : PrefixTree
    nodes : NodeKV
    heads : Heads
    q_shape : tuple of int
        Of the q of every run.
    rows : Rows
    like : tensor without elements, of the dtype and on the device of every run
    tables : tuple of Table or None
        The offsets and page tables that the caller gave; a run may name them again.
    """

    tree: PrefixTree
    nodes: NodeKV
    heads: Heads
    q_shape: tuple[int, ...]
    rows: Rows
    like: Tensor
    tables: Tables


def check_plan(
    tree: object, kv: KV, num_q_heads: object, q_len: object, cu_seqlens_q: object, max_seqlen_q: object,
    total_q: object, validate: bool,
) -> Planned:  # fmt: skip
    """Check the arguments of `hydragen.plan`, explained there, but the lengths."""
    if not isinstance(tree, PrefixTree):
        raise TypeError(
            f"tree must be a hydragen.PrefixTree, got {kind(tree)}; make one with PrefixTree.from_parents, "
            "from_levels or from_token_ids"
        )
    first = check_tensor(_first_keys(kv), "kv's first k")
    num_heads = as_positive_int(num_q_heads, "num_q_heads")
    rows, leading = _check_rows(tree.num_rows, q_len, cu_seqlens_q, max_seqlen_q, total_q, first.device)
    check_num_vectors(int(rows.lens.sum()), num_heads)
    if validate and rows.cu_seqlens_q is not None:
        check_offset_values(rows.cu_seqlens_q, leading[0], int(rows.lens.max(initial=0)))
    head_dim = first.shape[-1] if first.dim() else 0
    like = first.new_empty((0, num_heads, head_dim))
    _, nodes, heads = check_kv(kv, tree, tree.num_rows, like, validate)
    shape = (*leading, num_heads, head_dim)
    return Planned(tree, nodes.without_data(), heads, shape, rows, like, tables_of(kv))


def _first_keys(kv: object) -> object:
    if isinstance(kv, PackedKV):
        return kv.k
    if isinstance(kv, PagedKV):
        return kv.k_cache
    if isinstance(kv, Sequence) and not isinstance(kv, str) and kv:
        return _first_keys(kv[0]) if not isinstance(kv[0], Tensor) else kv[0]
    raise TypeError(
        "kv must be a list of levels [(k, v), ...], a hydragen.PackedKV or a hydragen.PagedKV, got "
        f"{kind(kv)}; give the keys and values of any layer"
    )


def _check_rows(
    num_rows: int, q_len: object, cu_seqlens_q: object, max_seqlen_q: object, total_q: object,
    device: torch.device,
) -> tuple[Rows, tuple[int, ...]]:  # fmt: skip
    """Return where the rows' queries are, and the leading sizes of q."""
    if cu_seqlens_q is None:
        for name, value in (("max_seqlen_q", max_seqlen_q), ("total_q", total_q)):
            if value is not None:
                raise ValueError(
                    f"{name} must come with cu_seqlens_q, got {shown(value)} alone; leave it out"
                )
        count = as_positive_int(1 if q_len is None else q_len, "q_len")
        check_num_queries(num_rows, count, "q_len")
        return equal_rows(num_rows, count), (num_rows, count)
    if q_len is not None:
        raise ValueError(
            f"q_len must be left out when cu_seqlens_q is given, got {shown(q_len)}; offsets say it all"
        )
    if on_device(cu_seqlens_q):
        rows = check_device_offsets(cu_seqlens_q, device, max_seqlen_q)
        with lasting_memory():  # a plan's own, for updates in place
            rows = rows._replace(cu_seqlens_q=cu_seqlens_q.clone())
        tokens = as_max(total_q, "total_q", "the number of tokens in packed q")
        _check_count(rows.lens, num_rows)
        return rows, (tokens,)
    cu = check_offsets(cu_seqlens_q, "cu_seqlens_q")
    lens = np.diff(cu)
    _check_count(lens, num_rows)
    check_num_queries(1, int(cu[-1]), "cu_seqlens_q")
    longest = int(lens.max(initial=0))
    if max_seqlen_q is not None and as_max(max_seqlen_q) < longest:
        raise ValueError(
            f"max_seqlen_q must be at least the query tokens of the longest row, {longest}, got "
            f"{max_seqlen_q}; raise it"
        )
    if total_q is not None and as_max(total_q, "total_q", "the last of cu_seqlens_q") != cu[-1]:
        raise ValueError(
            f"total_q must be the last of cu_seqlens_q, {cu[-1]}, got {shown(total_q)}; leave it out"
        )
    return Rows(cu[:-1], frozen(lens), None), (int(cu[-1]),)


def _check_count(lens: IntArray, num_rows: int) -> None:
    if lens.size != num_rows:
        raise ValueError(
            f"cu_seqlens_q must have one offset per row of the tree and the end, {num_rows} + 1, got "
            f"{lens.size + 1}; rows without queries count too"
        )


def check_reserve(reserve: object) -> float:
    """Return how many times its tables a plan has room for: a number from 1 to 1e6."""
    expected = "reserve must be a number from 1 to 1e6"
    if isinstance(reserve, bool) or not isinstance(reserve, numbers.Real):
        raise TypeError(f"{expected}, got {shown(reserve)}; 2.0 leaves room for twice the work")
    try:
        number = float(reserve)
    except OverflowError:  # an integer beyond every float
        number = math.inf
    if not 1 <= number <= _MOST_RESERVE:  # nor NaN
        raise ValueError(f"{expected}, got {number}; 2.0 leaves room for twice the work")
    return number


def check_run(planned: Planned, q: object, kv: KV | tuple[Tensor, Tensor]) -> tuple[Tensor, NodeKV]:
    """Return q and the keys and values of one run if they are what was planned for."""
    like = planned.like
    q = check_tensor(q, "q")
    if q.dtype is not like.dtype:
        raise TypeError(
            f"q must have the dtype that the plan was made for, {like.dtype}, got {q.dtype}; "
            "convert it with .to(dtype), or plan with kv of another dtype"
        )
    if q.device != like.device:
        raise ValueError(
            f"q must be on the device that the plan was made for, {like.device}, got {q.device}; "
            "move it with .to(device), or plan there"
        )
    if q.shape != planned.q_shape:
        raise ValueError(
            f"q must have the shape that the plan was made for, {list(planned.q_shape)}, got {list(q.shape)};"
            " plan for this one"
        )
    nodes = planned.nodes
    tensors = tensors_of_run(planned, kv)
    ks, vs = [], []
    for i, (k, v) in enumerate(tensors):
        where = "kv" if len(tensors) == 1 and not nodes.by_level else f"kv[{i}]"
        ks.append(check_like(k, nodes.k[i], f"{where} k", like))
        vs.append(check_like(v, nodes.v[i], f"{where} v", like))
    return q, nodes._replace(
        k=tuple(ks),
        v=tuple(vs),
        k_strides=tuple([strides_of(k) for k in ks]),
        v_strides=tuple([strides_of(v) for v in vs]),
    )


def tensors_of_run(planned: Planned, kv: object) -> list[tuple[object, object]]:
    """Return the pair of keys and values of each level."""
    return tensors_of(kv, planned.tables, len(planned.nodes.k) if planned.nodes.by_level else None)


def check_like(x: object, planned: Tensor, name: str, like: Tensor) -> Tensor:
    """Return `x` if it is a tensor shaped like the `planned` one."""
    tensor = check_tensor(x, name, like)
    if tensor.shape != planned.shape:
        raise ValueError(
            f"{name} must have the shape that the plan was made for, {list(planned.shape)}, got "
            f"{list(tensor.shape)}; plan for this one"
        )
    return tensor

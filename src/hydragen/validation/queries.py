"""Checks of the queries: a batch of equal rows, or packed rows with offsets on the host or on the device."""

from __future__ import annotations

import numbers
import reprlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hydragen.host_ints import IntArray, as_int_vector, frozen
from hydragen.lengths import on_device
from hydragen.validation.tensors import shown

# Of query tokens that no tensor proves: a plan takes some 50 bytes of host memory for each, here 7 GB.
MOST_QUERIES = 2**27
# Of query tokens times heads: some 2 bytes of a plan's tables for each.
MOST_VECTORS = 2**31


class Rows(NamedTuple):
    """Where each row's query tokens are.

    Attributes
    ----------
    starts, lens : int64 [num_rows]
        First token (in q flattened over tokens) and number of tokens of each row; capacities if
        `cu_seqlens_q` is set.
    cu_seqlens_q : integer tensor [num_rows + 1] or None
        Set only if the query lengths live on the device.
    """

    starts: IntArray
    lens: IntArray
    cu_seqlens_q: Tensor | None


def check_queries(q: Tensor, cu_seqlens_q: object, max_seqlen_q: object, validate: bool) -> Rows:
    """Return where the rows of `q` begin and how long they are; `q` is known to be a tensor."""
    if cu_seqlens_q is None:
        if max_seqlen_q is not None:
            raise ValueError(
                f"max_seqlen_q must come with cu_seqlens_q, got {shown(max_seqlen_q)} alone; leave it out"
            )
        if q.dim() != 4:
            raise ValueError(
                f"q must have shape [batch, q_len, num_q_heads, head_dim], got {list(q.shape)}; "
                "packed q [total_q, num_q_heads, head_dim] needs cu_seqlens_q"
            )
        batch, q_len = q.shape[:2]
        if q_len < 1:
            raise ValueError(
                f"q must have at least one query per row, got shape {list(q.shape)} with q_len 0; "
                "rows without queries can be packed, with cu_seqlens_q"
            )
        return equal_rows(batch, q_len)
    if q.dim() != 3:
        raise ValueError(
            "q must have shape [total_q, num_q_heads, head_dim] when cu_seqlens_q is given, got "
            f"{list(q.shape)}; leave cu_seqlens_q out for [batch, q_len, num_q_heads, head_dim]"
        )
    if on_device(cu_seqlens_q):
        rows = check_device_offsets(cu_seqlens_q, q.device, max_seqlen_q)
        if validate:
            check_offset_values(cu_seqlens_q, q.shape[0], as_max(max_seqlen_q))
        return rows
    cu = check_cu_seqlens(cu_seqlens_q, "cu_seqlens_q", q.shape[0], "q")
    lens = np.diff(cu)
    if max_seqlen_q is not None:
        _check_max(as_max(max_seqlen_q), lens)
    return Rows(cu[:-1], lens, None)


def check_cu_seqlens(value: object, name: str, total: int, of: str) -> IntArray:
    """Return offsets on the host as int64: from 0, never decreasing, up to the `total` tokens of `of`."""
    cu = check_offsets(value, name)
    if cu[-1] != total:
        raise ValueError(
            f"{name} must end with the number of tokens in {of}, {total}, got {cu[-1]}; "
            "cut the tensor or correct the offsets"
        )
    return cu


def check_offsets(value: object, name: str) -> IntArray:
    """Return offsets on the host as int64: from 0, never decreasing."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        raise ValueError(
            f"{name} must be on the host (plans are made from it), got device {value.device}; "
            "copy it with .cpu(), and give lengths that change on the device as kv_lens"
        )
    cu = as_int_vector(value, name).copy()
    if cu.size < 1 or cu[0] != 0:
        raise ValueError(
            f"{name} must begin with 0, got {cu[:4].tolist()}; give the offset of each entry, and the end"
        )
    falls = cu[1:] < cu[:-1]  # not by differences, which may pass int64
    if falls.any():
        at = int(falls.argmax())
        raise ValueError(
            f"{name} must not decrease, got {cu[at]} then {cu[at + 1]} at index {at + 1}; "
            "give cumulative offsets"
        )
    return frozen(cu)


@lru_cache(maxsize=64)
def equal_rows(batch: int, q_len: int) -> Rows:
    """Return rows of `q_len` tokens each, end to end."""
    return Rows(frozen(np.arange(batch) * q_len), frozen(np.full(batch, q_len)), None)


def check_device_offsets(cu_seqlens_q: Tensor, device: torch.device, max_seqlen_q: object) -> Rows:
    """Return rows of equal capacity; which tokens they hold is computed on the device."""
    if cu_seqlens_q.device != device:
        raise ValueError(
            f"cu_seqlens_q must be on the host or on the device of q, {device}, got {cu_seqlens_q.device}; "
            "move it with .to(device)"
        )
    if cu_seqlens_q.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"cu_seqlens_q must be int32 or int64, got {cu_seqlens_q.dtype}; convert it with .int()"
        )
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.numel() < 1:
        raise ValueError(
            "cu_seqlens_q must be a vector of num_rows + 1 offsets, got shape "
            f"{list(cu_seqlens_q.shape)}; give the offset of each row, and the end"
        )
    if max_seqlen_q is None:
        raise ValueError(
            "max_seqlen_q must be given when cu_seqlens_q lives on a device (it is not read back), got None; "
            "pass the most query tokens that any row can have"
        )
    num_rows, longest = cu_seqlens_q.numel() - 1, as_max(max_seqlen_q)
    check_num_queries(num_rows, longest, "max_seqlen_q")
    equal = equal_rows(num_rows, longest)
    return Rows(equal.starts, equal.lens, cu_seqlens_q)


def check_num_queries(num_rows: int, each: int, name: str) -> None:
    """Raise if `num_rows` rows of `each` tokens, as argument `name` says, are more than a plan can hold."""
    if num_rows * each > MOST_QUERIES:
        total = f"{num_rows} rows of {reprlib.repr(each)}" if num_rows > 1 else reprlib.repr(each)
        raise ValueError(
            f"{name} must make at most {MOST_QUERIES} query tokens in all, got {total}; give the tokens of "
            "one call"
        )


def check_num_vectors(num_tokens: int, num_q_heads: int) -> None:
    """Raise if that many query tokens have more heads than a plan can hold."""
    if num_tokens * num_q_heads > MOST_VECTORS:
        raise ValueError(
            f"num_q_heads must make at most {MOST_VECTORS} query tokens times heads, got {num_q_heads} heads "
            f"of {num_tokens} tokens; give the heads and tokens of one call"
        )


def check_offset_values(cu_seqlens_q: Tensor, total: int, max_seqlen_q: int) -> None:
    """Raise if offsets on a device do not fit q; waits for it."""
    _check_max(max_seqlen_q, np.diff(check_cu_seqlens(cu_seqlens_q.cpu(), "cu_seqlens_q", total, "q")))


def as_max(
    value: object, name: str = "max_seqlen_q", meaning: str = "the query tokens of the longest row"
) -> int:
    """Return a count of tokens."""
    expected = f"{name} must be an integer of at least 0"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{expected}, got {shown(value)}; pass {meaning}")
    if value < 0:
        raise ValueError(f"{expected}, got {value}; pass {meaning}")
    return int(value)


def _check_max(max_seqlen_q: int, lens: IntArray) -> None:
    longest = int(lens.max(initial=0))
    if longest > max_seqlen_q:
        raise ValueError(
            f"max_seqlen_q must be at least the query tokens of the longest row, {longest}, "
            f"got {max_seqlen_q}; raise it"
        )

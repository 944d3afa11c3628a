"""Vectors of unequal lengths end to end: where each begins, and the indices of all of them."""

from __future__ import annotations

import numpy as np

from hydragen.host_ints import IntArray


def offsets(counts: IntArray) -> IntArray:
    """Return where each of `counts` things begins and the last ends, int64 [len(counts) + 1]."""
    ends = np.zeros(counts.size + 1, np.int64)
    counts.cumsum(out=ends[1:])
    return ends


def expand(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Return (i, j) for i over `counts` and j over range(counts[i]), as two flat arrays."""
    owner = np.arange(counts.size).repeat(counts)
    within = np.arange(owner.size)
    within -= offsets(counts)[owner]
    return owner, within


def ranges(begin: IntArray, counts: IntArray, before: IntArray) -> IntArray:
    """Return begin[i], ..., begin[i] + counts[i] - 1 for each i, end to end; `before` is offsets(counts)."""
    indices = np.arange(before[-1])
    indices += (begin - before[:-1]).repeat(counts)
    return indices


def changes(values: IntArray) -> IntArray:
    """Return where stretches of equal values begin, int64 [number of stretches]."""
    differs = np.ones(values.size, np.bool_)
    np.not_equal(values[1:], values[:-1], out=differs[1:])
    return differs.nonzero()[0]


def descending(major: IntArray, minor: IntArray) -> IntArray:
    """Return the order from the largest to the smallest, by `major` and then by `minor`, of at least 0.

    Equals keep their order. Values that fit in 16 bits, as most do, are sorted by radix, several times as
    fast.
    """
    span = int(minor.max(initial=0)) + 1
    most = (int(major.max(initial=0)) + 1) * span - 1
    if most < 1 << 16:
        return (most - minor - major * span).astype(np.uint16).argsort(kind="stable")
    order = _descending(minor)
    return order[_descending(major[order])]


def _descending(values: IntArray) -> IntArray:
    below = values.max(initial=0) - values
    narrow = below.max(initial=0) < 1 << 16
    return np.argsort(below.astype(np.uint16) if narrow else below, kind="stable")

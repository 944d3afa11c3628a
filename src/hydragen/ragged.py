"""Vectors of unequal lengths end to end: where each begins, and the indices of all of them."""

from __future__ import annotations

import numpy as np

from hydragen.host_ints import IntArray


def offsets(counts: IntArray) -> IntArray:
    """Return where each of `counts` things begins and the last ends, int64 [len(counts) + 1]."""
    ends = np.zeros(counts.size + 1, np.int64)
    np.cumsum(counts, out=ends[1:])
    return ends


def expand(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Return (i, j) for i over `counts` and j over range(counts[i]), as two flat arrays."""
    owner = np.repeat(np.arange(counts.size), counts)
    first = np.cumsum(counts) - counts
    return owner, np.arange(owner.size) - first[owner]


def ranges(begin: IntArray, counts: IntArray) -> IntArray:
    """Return begin[i], ..., begin[i] + counts[i] - 1 for each i, end to end."""
    shift = np.repeat(begin - (np.cumsum(counts) - counts), counts)
    return shift + np.arange(shift.size)


def descending(values: IntArray) -> IntArray:
    """Return the order from the largest to the smallest; equals keep theirs.

    Values that differ by less than 2**16, as most do, are sorted by radix, several times as fast.
    """
    below = values.max(initial=0) - values
    narrow = below.max(initial=0) < 1 << 16
    return np.argsort(below.astype(np.uint16) if narrow else below, kind="stable")

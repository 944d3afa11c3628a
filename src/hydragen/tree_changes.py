"""Other trees made from one, as arrays: forked rows, nothing shared."""

from __future__ import annotations

import reprlib

import numpy as np

from hydragen.host_ints import IntArray, as_int_vector

# More than any call can have query tokens (validation.queries): a count that is meant for something else.
_MOST_ROWS = 2**27

Arrays = tuple[IntArray, IntArray | None, IntArray, IntArray | None]


def forked(arrays: Arrays, counts: object, in_place: bool) -> Arrays:
    """Give row r counts[r] successors, each at a new, empty node below; `in_place`: one alone stays."""
    if not isinstance(in_place, bool):
        raise TypeError(f"in_place must be True or False, got {in_place!r}; convert it with bool()")
    parents, kv_lens, row_to_node, token_ids = arrays
    given = np.full(row_to_node.size, counts) if isinstance(counts, (int, np.integer)) else counts
    each = as_int_vector(given, "counts")
    if each.size != row_to_node.size or (each < 0).any():
        raise ValueError(
            f"counts must hold a number of at least 0 for each of the {row_to_node.size} rows, got "
            f"{reprlib.repr(each.tolist())}; 1 lets a row go on alone"
        )
    rows = float(each.sum(dtype=np.float64))  # a sum of int64 might wrap around
    if rows > _MOST_ROWS:
        raise ValueError(
            f"counts must give at most {_MOST_ROWS} rows in all, got {rows:.3g}; give the number of rows "
            "that each row goes on as"
        )
    ends, below = np.repeat(row_to_node, each), np.repeat(~(in_place & (each == 1)), each)
    above = ends[below]
    lengths = None if kv_lens is None else np.append(kv_lens, np.zeros(above.size, np.int64))
    ends[below] = parents.size + np.arange(above.size)
    return np.append(parents, above), lengths, ends, token_ids


def unshared(arrays: Arrays, paths: list[IntArray]) -> Arrays:
    """Give row i a root of its own, node i, with all tokens of its path."""
    _, kv_lens, _, token_ids = arrays
    nodes = np.arange(len(paths))
    if kv_lens is None:
        return np.full(nodes.size, -1), None, nodes, None
    lengths = np.array([kv_lens[path].sum() for path in paths], np.int64)
    if token_ids is not None:
        ends = np.cumsum(kv_lens)
        runs = [token_ids[ends[node] - kv_lens[node] : ends[node]] for path in paths for node in path]
        token_ids = np.concatenate([token_ids[:0], *runs])
    return np.full(nodes.size, -1), lengths, nodes, token_ids

"""Dense softmax attention in NumPy and float64: what every other implementation is judged by.

Slow on purpose. One loop over query tokens, one over heads, and a tree is flattened by copying every row's
keys and values side by side, so that nothing is shared, split or merged.

Conventions
-----------
- A logit is `scale * dot(q, k)`, then `softcap * tanh(logit / softcap)`, then the mask.
- Masks use absolute positions along the row's path: key `j` sits at position `j`, query `i` of `q_len` at
  `path_len - q_len + i`. `causal` keeps `key <= query`; `window` keeps `query - key < window`.
- `lse` is the natural log of the sum of `exp(logit)` over the visible keys and the sink.
- A query that sees no key, or only logits of -inf: `out = 0`, `lse = -inf` (with a sink: `lse = sink`).
- A key that the mask hides is never looked at. NaN in a visible key or value comes out as NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def dense_attention(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: NDArray[Any] | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Attention of one sequence's queries over its own keys and values.

    Parameters
    ----------
    q : array [q_len, num_q_heads, head_dim]
        Queries; the last one sits at the position of the last key.
    k : array [kv_len, num_kv_heads, head_dim]
        Keys. Query head `h` uses KV head `h // (num_q_heads // num_kv_heads)`.
    v : array [kv_len, num_kv_heads, head_dim_v]
        Values.
    scale : float, optional
        Factor of the dot products; `head_dim ** -0.5` if None. Any sign, 0 included.
    causal : bool
        Hide the keys after the query.
    window : int, optional
        Hide the keys that lie `window` or more positions before the query.
    softcap : float, optional
        Squash logits into (-softcap, softcap).
    sinks : array [num_q_heads], optional
        One more logit per head, whose value is zero.

    Returns
    -------
    out : float64 array [q_len, num_q_heads, head_dim_v]
    lse : float64 array [q_len, num_q_heads]
        Natural logarithm.
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    q_len, num_q_heads, head_dim = q.shape
    kv_len, num_kv_heads, head_dim_v = v.shape
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"num_q_heads must be a multiple of num_kv_heads, got {num_q_heads} and {num_kv_heads}"
        )
    group_size = num_q_heads // num_kv_heads
    if scale is None:
        scale = head_dim**-0.5

    out = np.zeros((q_len, num_q_heads, head_dim_v))
    lse = np.full((q_len, num_q_heads), -np.inf)
    for i in range(q_len):
        visible = _visible(kv_len - q_len + i, kv_len, causal, window)
        for h in range(num_q_heads):
            keys, values = k[visible, h // group_size], v[visible, h // group_size]
            logits = (keys @ q[i, h]) * scale
            if softcap is not None:
                logits = softcap * np.tanh(logits / softcap)
            sink = -np.inf if sinks is None else float(sinks[h])
            out[i, h], lse[i, h] = _softmax_average(logits, values, sink)
    return out, lse


def tree_attention(
    q: Sequence[NDArray[Any]],
    k: Sequence[NDArray[Any]],
    v: Sequence[NDArray[Any]],
    parents: Sequence[int] | NDArray[np.integer[Any]],
    row_to_node: Sequence[int] | NDArray[np.integer[Any]],
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: NDArray[Any] | None = None,
) -> tuple[list[FloatArray], list[FloatArray]]:
    """Attention of every row over the keys and values along its path from the root.

    Parameters
    ----------
    q : sequence of arrays [q_len, num_q_heads, head_dim]
        One per row; `q_len` may differ.
    k, v : sequences of arrays [kv_len, num_kv_heads, head_dim or head_dim_v]
        One per node of the tree; `kv_len` may differ and may be 0.
    parents : sequence of int [num_nodes]
        The node above each node, -1 for a root.
    row_to_node : sequence of int [num_rows]
        The node at which each row's path ends; leaf or not, and several rows may share one.
    scale, causal, window, softcap, sinks
        As for `dense_attention`, with positions counted along the row's path.

    Returns
    -------
    out : list of float64 arrays [q_len, num_q_heads, head_dim_v]
    lse : list of float64 arrays [q_len, num_q_heads]
        One each per row, in the order of `q`.
    """
    outs, lses = [], []
    for row_q, last_node in zip(q, row_to_node, strict=True):
        path: list[int] = []
        node = int(last_node)
        while node >= 0:
            path.insert(0, node)
            node = int(parents[node])
        out, lse = dense_attention(
            row_q,
            np.concatenate([k[node] for node in path]),
            np.concatenate([v[node] for node in path]),
            scale=scale,
            causal=causal,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )
        outs.append(out)
        lses.append(lse)
    return outs, lses


def _visible(query: int, kv_len: int, causal: bool, window: int | None) -> NDArray[np.bool_]:
    """Which keys [kv_len] a query at absolute position `query` may see."""
    keys = np.arange(kv_len)
    visible = np.ones(kv_len, dtype=np.bool_)
    if causal:
        visible &= keys <= query
    if window is not None:
        visible &= query - keys < window
    return visible


def _softmax_average(logits: FloatArray, values: FloatArray, sink: float) -> tuple[FloatArray, float]:
    """Average of `values` [n, head_dim_v] under softmax of `logits` [n] and a sink; log of the sum."""
    logits = np.append(logits, sink)
    values = np.append(values, np.zeros((1, values.shape[1])), axis=0)
    # Any finite shift gives the same weights; the largest logit keeps exp() in range. Where that is infinite,
    # subtracting it would give inf - inf, so the nearest finite number stands in for it.
    largest_float = np.finfo(np.float64).max
    shift = np.clip(logits.max(), -largest_float, largest_float)
    with np.errstate(invalid="ignore", over="ignore"):
        weights = np.exp(logits - shift)
        total = weights.sum()
        if total == 0.0:  # only logits of -inf
            return np.zeros(values.shape[1]), -np.inf
        return (weights / total) @ values, float(shift + np.log(total))

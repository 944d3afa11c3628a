"""Arguments of hydragen.attention that fit together, for tests to break or bend."""

from typing import Any

import torch

from hydragen import PackedKV, PrefixTree

BATCH, Q_LEN, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 4, 2, 8


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def keys(nodes: int = BATCH, length: int = 3, heads: int = NUM_KV_HEADS, dim: int = HEAD_DIM) -> torch.Tensor:
    return zeros(nodes, length, heads, dim)


def two_levels(**changes: Any) -> dict[str, Any]:
    """Arguments that are right (one prefix of 5 tokens, 4 suffixes of up to 3), some of them replaced."""
    right = {
        "q": zeros(BATCH, Q_LEN, NUM_Q_HEADS, HEAD_DIM),
        "kv": [(keys(1, 5), keys(1, 5)), (keys(), keys())],
    }
    return {**right, **changes}


def packed(**changes: Any) -> dict[str, Any]:
    """Everything packed: a root of 5 tokens, 4 leaves of 3, rows of 1, 2, 0 and 4 queries."""
    right = {
        "q": zeros(7, NUM_Q_HEADS, HEAD_DIM),
        "kv": packed_kv(),
        "tree": star(),
        "cu_seqlens_q": [0, 1, 3, 3, 7],
    }
    return {**right, **changes}


def packed_kv(k: Any = None, v: Any = None, cu_seqlens_k: Any = (0, 5, 8, 11, 14, 17)) -> PackedKV:
    right = zeros(17, NUM_KV_HEADS, HEAD_DIM)
    return PackedKV(right if k is None else k, right if v is None else v, cu_seqlens_k)


def star(leaves: int = BATCH, kv_lens: Any = None) -> PrefixTree:
    return PrefixTree.from_parents([-1] + [0] * leaves, kv_lens)

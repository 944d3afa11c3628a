"""A prefix and suffixes that grow, for tests of plans."""

from typing import Any

import torch
from pages import paged
from torch import Tensor

from hydragen import AttentionState, PackedKV, PrefixTree

HEADS, KV_HEADS, DIM = 4, 2, 16
BATCH, PREFIX, ROOM = 5, 21, 9
TREE = PrefixTree.from_levels([[PREFIX], [ROOM] * BATCH])
LEVELS = [(1, PREFIX), (BATCH, ROOM)]
Pair = tuple[Tensor, Tensor]


def normal(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def layer(seed: int, device: torch.device) -> list[Pair]:
    """Keys and values of one layer: a prefix, and room for suffixes."""
    made = [normal(2, nodes, tokens, KV_HEADS, DIM, seed=seed, device=device) for nodes, tokens in LEVELS]
    return [(kv[0], kv[1]) for kv in made]


def queries(q_len: int = 1, seed: int = 9, device: torch.device | str = "cpu") -> Tensor:
    return normal(BATCH, q_len, HEADS, DIM, seed=seed, device=device)


def state(result: Tensor | AttentionState) -> AttentionState:
    assert isinstance(result, AttentionState)
    return result


def same(found: Tensor | AttentionState, expected: Tensor | AttentionState) -> None:
    """Equal bit for bit: the same work in the same tiles."""
    for a, b in zip(state(found), state(expected), strict=True):
        assert torch.equal(a, b)


def close(found: Tensor | AttentionState, expected: Tensor | AttentionState) -> None:
    """Equal up to another order of the same float32 sums; the oracle judges attention() elsewhere."""
    for a, b in zip(state(found), state(expected), strict=True):
        torch.testing.assert_close(a, b)


LAYOUTS = ["levels", "packed", "paged"]


def growing(layout: str, device: torch.device) -> tuple[Any, Any, list[Tensor]]:
    """Keys and values of a prefix and of empty suffixes with room; their lengths; views of the suffixes."""
    lens = torch.zeros(BATCH, dtype=torch.int64, device=device)
    k, v = normal(2, PREFIX + BATCH * ROOM, KV_HEADS, DIM, device=device)
    if layout == "levels":
        kv: Any = [
            (k[None, :PREFIX], v[None, :PREFIX]),
            tuple(x[PREFIX:].unflatten(0, (BATCH, ROOM)).clone() for x in (k, v)),
        ]
        return kv, [None, lens], list(kv[1])
    all_lens = torch.cat([torch.tensor([PREFIX], device=device), lens])
    if layout == "packed":
        kv = PackedKV(k, v, [0, *range(PREFIX, PREFIX + BATCH * ROOM + 1, ROOM)])
        return kv, all_lens, [x[PREFIX:].unflatten(0, (BATCH, ROOM)) for x in (k, v)]
    kv = paged(k, v, [PREFIX, *[ROOM] * BATCH], 4)
    table = kv.page_indices[kv.page_indptr[1] :].view(BATCH, -1)
    return kv, all_lens, [kv.k_cache, kv.v_cache, table]


def suffix(layout: str, views: list[Tensor], which: int) -> Tensor:
    """The suffixes' keys (0) or values (1), [BATCH, ROOM, heads, dim]."""
    if layout == "paged":
        return views[which][views[2].long()].flatten(1, 2)[:, :ROOM]
    return views[which]

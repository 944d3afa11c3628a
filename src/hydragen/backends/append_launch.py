"""New keys and values to where they belong in a cache, in one launch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hydragen.backends.appends import Slots
from hydragen.backends.launch import Launcher, alignment
from hydragen.backends.launches import padded
from hydragen.kernels.append import append as kernel


def append(caches: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], slots: Slots) -> None:
    """Do what `appends.write` does; the tensors of `slots` must be contiguous."""
    place, source, fresh = slots
    index = place[0]
    if not index.numel() or not new[0].shape[2]:
        return
    launcher = _launcher(
        tuple([x.shape for x in new]),
        tuple([x.stride() for x in new]),
        tuple([_strides(x, len(place)) for x in caches]),
        index.numel(),
        (len(place) > 1, source is not None, fresh is not None),
        (*[x.dtype for x in (*new, *caches)], index.device),
    )
    tensors = (
        *new,
        *caches,
        index,
        place[-1],
        index if source is None else source,
        index if fresh is None else fresh.view(torch.uint8),
    )
    with torch.cuda.device_of(index):
        launcher(tensors, alignment((*new, *caches)))
    for cache in caches:  # as any write in place does
        if not cache.is_inference():
            torch.autograd.graph.increment_version(cache)


def _strides(cache: Tensor, places: int) -> tuple[int, ...]:
    """Return the strides of both places, head and element; 0 for a place that there is not."""
    first = cache.stride()[:places]
    return (first[0], first[1] if places > 1 else 0, *cache.stride()[places:])


@lru_cache(maxsize=256)
def _launcher(
    shapes: tuple[torch.Size, torch.Size],
    strides: tuple[tuple[int, ...], tuple[int, ...]],
    cache_strides: tuple[tuple[int, ...], tuple[int, ...]],
    count: int,
    flags: tuple[bool, bool, bool],
    kinds: tuple[Any, ...],
) -> Any:
    (_, q_len, num_heads, head_dim), head_dim_v = shapes[0], shapes[1][-1]
    itemsize = kinds[0].itemsize
    block_h = min(8, 1 << (num_heads - 1).bit_length())
    constants = (
        head_dim,
        head_dim_v,
        block_h,
        padded(head_dim, itemsize),
        padded(head_dim_v, itemsize),
        *flags,
    )
    numbers = (q_len, num_heads, *strides, *cache_strides)
    return Launcher(kernel, (count, -(-num_heads // block_h), 1), numbers, constants, {"num_warps": 4}, kinds)

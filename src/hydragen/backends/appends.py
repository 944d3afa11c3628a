"""New keys and values to where they belong in a cache: in one launch on a GPU, in plain PyTorch elsewhere."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def write(
    caches: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    place: tuple[Tensor, ...],
    source: Tensor | None = None,
    fresh: Tensor | None = None,
) -> None:
    """Write new tokens in plain PyTorch.

    Parameters
    ----------
    caches : tensors [..., num_kv_heads, head_dim], and head_dim_v
        Of one or two dimensions before the heads.
    new : tensors [num_rows, q_len, num_kv_heads, head_dim], and head_dim_v
    place : one or two int64 tensors [tokens] or [num_rows, q_len]
        Where in the first dimensions of the caches tokens go. None that differ go to the same place.
    source : int64, of the same shape, optional
        Which of all new tokens, row after row, goes there.
    fresh : bool, of the same shape, optional
        Whether it is written.
    """
    for cache, x in zip(caches, new, strict=True):
        tokens = x.flatten(0, 1)
        if source is None:
            value = tokens.unflatten(0, place[0].shape) if place[0].dim() > 1 else tokens
        else:
            value = tokens[source]
        if fresh is not None:
            value = torch.where(fresh[..., None, None], value, cache[place])
        cache.index_put_(place, value)


def launch(
    caches: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    place: tuple[Tensor, ...],
    source: Tensor | None = None,
    fresh: Tensor | None = None,
) -> None:
    """Do what `write` does in one launch."""
    from hydragen.backends.launch import INTERPRET, alignment  # noqa: PLC0415 (only with triton)

    if not place[0].numel() or not new[0].shape[2]:
        return
    index = place[0]
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
    if not INTERPRET:  # as any write in place does, which index_put_ would have counted
        for cache in caches:
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
    from hydragen.backends.launch import Launcher  # noqa: PLC0415
    from hydragen.backends.launches import padded  # noqa: PLC0415
    from hydragen.kernels.append import append  # noqa: PLC0415

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
    return Launcher(append, (count, -(-num_heads // block_h), 1), numbers, constants, {"num_warps": 4}, kinds)

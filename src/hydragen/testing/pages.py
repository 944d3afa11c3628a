"""Keys and values of a problem in a paged pool, as inference engines keep them.

Pages lie in any order, some belong to nobody, and whatever no segment uses is NaN: other pages, and the rest
of each segment's last page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from hydragen.testing.inputs import Inputs
    from hydragen.testing.problem import Problem

PAGE_SIZES = (1, 2, 3, 16, 64, 128)

Pool = Literal["apart", "together", "heads_first"]
"""Where a pool lies: keys and values each in a tensor; in one tensor, ``[num_pages, 2, ...]``; heads before
tokens, ``[num_pages, num_kv_heads, page_size, head_dim]``."""

POOLS: tuple[Pool, ...] = get_args(Pool)


@dataclass(frozen=True, eq=False)
class Pages:
    """A pool of pages and which of them hold which segment.

    Attributes
    ----------
    k_cache, v_cache
        ``[num_pages, page_size, num_kv_heads, head_dim]``, ``[..., head_dim_v]``.
    page_indptr, page_indices
        int32 on the CPU: node i owns the pages ``page_indices[page_indptr[i]:page_indptr[i + 1]]``, in order.
    kv_lens
        Tokens in use of each node.
    """

    k_cache: Tensor
    v_cache: Tensor
    page_indptr: Tensor
    page_indices: Tensor
    kv_lens: tuple[int, ...]

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return int(self.k_cache.shape[1])

    def to(self, device: torch.device | str) -> Pages:
        """The same with the pool on a device; the tables stay on the CPU."""
        return replace(self, k_cache=copied(self.k_cache, device), v_cache=copied(self.v_cache, device))

    def clone(self) -> Pages:
        """A copy with the same strides that shares no memory."""
        return Pages(
            copied(self.k_cache, self.k_cache.device),
            copied(self.v_cache, self.v_cache.device),
            self.page_indptr.clone(),
            self.page_indices.clone(),
            self.kv_lens,
        )


def paged(problem: Problem, inputs: Inputs, page_size: int, seed: int = 0, spare: int = 0) -> Pages:
    """Put a problem's keys and values into pages.

    Parameters
    ----------
    page_size
        Tokens of a page, at least 1.
    seed
        Of the order in which pages are given out, and of how many belong to nobody.
    spare
        Tokens for which each node has room beyond its own.

    Raises
    ------
    ValueError
        If ``page_size`` is less than 1.
    """
    if page_size < 1:
        raise ValueError(f"page_size must be at least 1, got {page_size}")
    rng = np.random.default_rng(seed)
    counts = [-(-(kv_len + spare) // page_size) for kv_len in problem.kv_lens]
    indptr = np.append(0, np.cumsum(counts))
    used = int(indptr[-1])
    order = rng.permutation(used + int(rng.integers(1, 4)))
    indices = order[:used]
    # each token's place among all slots of the pool: its page, and where in it
    lens = np.array(problem.kv_lens, np.int64)
    within = np.arange(lens.sum()) - np.repeat(np.cumsum(lens) - lens, lens)
    page = indices[np.repeat(indptr[:-1], lens) + within // page_size]
    slot = torch.from_numpy(page * page_size + within % page_size)
    caches = []
    for tensor in (inputs.k, inputs.v):
        shape = (len(order) * page_size, *tensor.shape[1:])
        cache = torch.full(shape, math.nan, dtype=tensor.dtype, device=tensor.device)
        cache[slot.to(tensor.device)] = tensor
        caches.append(cache.unflatten(0, (len(order), page_size)))
    return Pages(
        caches[0],
        caches[1],
        torch.from_numpy(indptr).to(torch.int32),
        torch.from_numpy(indices).to(torch.int32),
        problem.kv_lens,
    )


def in_pages(problem: Problem, inputs: Inputs, page_size: int, seed: int = 0, pool: Pool = "apart") -> Inputs:
    """The same inputs with keys and values in ``pages`` alone: ``k`` and ``v`` are NaN."""
    pages = _laid_out(paged(problem, inputs, page_size, seed), pool)
    nothing = (torch.full_like(tensor, math.nan) for tensor in (inputs.k, inputs.v))
    k, v = nothing
    return replace(inputs, k=k, v=v, pages=pages)


def _laid_out(pages: Pages, pool: Pool) -> Pages:
    """The same pages in another pool."""
    k, v = pages.k_cache, pages.v_cache
    if pool == "apart":
        return pages
    if pool == "heads_first":
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
        return replace(pages, k_cache=k, v_cache=v)
    if pool == "together":
        width = max(k.shape[-1], v.shape[-1])
        both = k.new_full((k.shape[0], 2, *k.shape[1:-1], width), math.nan)
        both[:, 0, ..., : k.shape[-1]], both[:, 1, ..., : v.shape[-1]] = k, v
        return replace(pages, k_cache=both[:, 0, ..., : k.shape[-1]], v_cache=both[:, 1, ..., : v.shape[-1]])
    raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")


def copied(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The same values with the same strides from the same place of a memory that is NaN elsewhere."""
    offset = tensor.storage_offset()
    if tensor.is_contiguous() and offset == 0:
        return tensor.to(device, copy=True)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    storage = torch.full((offset + max(extent, 0),), math.nan, dtype=tensor.dtype, device=device)
    target = storage.as_strided(tensor.shape, tensor.stride(), offset)
    # what lies in one place is written once
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
    target[once].copy_(tensor[once])
    return target

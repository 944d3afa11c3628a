"""Keys and values of a problem in a paged pool, as inference engines keep them.

Pages lie in any order, some belong to nobody, and whatever no segment uses is NaN: other pages, and the rest
of each segment's last page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from hydragen.testing.inputs import Inputs
    from hydragen.testing.problem import Problem

PAGE_SIZES = (1, 2, 3, 16, 64)


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
        return replace(self, k_cache=self.k_cache.to(device), v_cache=self.v_cache.to(device))

    def clone(self) -> Pages:
        """A copy that shares no memory."""
        return Pages(
            self.k_cache.clone(),
            self.v_cache.clone(),
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


def in_pages(problem: Problem, inputs: Inputs, page_size: int, seed: int = 0) -> Inputs:
    """The same inputs with keys and values in ``pages`` alone: ``k`` and ``v`` are NaN."""
    pages = paged(problem, inputs, page_size, seed)
    nothing = (torch.full_like(tensor, math.nan) for tensor in (inputs.k, inputs.v))
    k, v = nothing
    return replace(inputs, k=k, v=v, pages=pages)

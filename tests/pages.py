"""A pool of scattered pages that holds what a packed tensor holds; everything else in it is NaN."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hydragen import PagedKV


def paged(
    k: Tensor,
    v: Tensor,
    kv_lens: Sequence[int],
    page_size: int,
    *,
    spare_pages: int = 0,
    layout: str = "NHD",
    seed: int = 0,
) -> PagedKV:
    """Scatter packed k and v [total_k, num_kv_heads, dim], node after node, over a pool of pages.

    `layout`: NHD, two pools [pages, page_size, heads, dim]; HND, heads before tokens; one, a single pool
    [pages, 2, page_size, heads, dim]. `spare_pages` more than a node needs are in its part of the table.
    """
    counts = [-(-length // page_size) + spare_pages for length in kv_lens]
    indptr = torch.tensor([0, *counts]).cumsum(0)
    total = int(indptr[-1])
    num_pages = total + 3
    indices = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed))[:total]
    pools = []
    for x in (k, v):
        pool = x.new_full((num_pages, page_size, *x.shape[1:]), torch.nan)
        for node, length in enumerate(kv_lens):
            first = sum(kv_lens[:node])
            for page in range(-(-length // page_size)):
                tokens = x[first + page * page_size : first + min(length, (page + 1) * page_size)]
                pool[indices[indptr[node] + page], : tokens.shape[0]] = tokens
        pools.append(pool)
    if layout == "HND":
        pools = [pool.transpose(1, 2).contiguous().transpose(1, 2) for pool in pools]
    elif layout == "one":
        both = torch.stack(pools, 1)
        pools = [both[:, 0], both[:, 1]]
    return PagedKV(pools[0], pools[1], indptr, indices.to(torch.int32).to(k.device))

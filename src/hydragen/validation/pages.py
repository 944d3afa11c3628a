"""Checks of a pool of pages and its page table."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hydragen.host_ints import IntArray, as_int_vector
from hydragen.kv import PagedKV
from hydragen.lengths import on_device
from hydragen.validation.queries import check_offsets
from hydragen.validation.tensors import check_tensor


def check_pages(kv: PagedKV, q: Tensor, validate: bool) -> tuple[Tensor, Tensor, IntArray, Tensor]:
    """Return the pools, each node's offset in the page table, and the page table, int32 on q's device."""
    k, v = check_pools(kv.k_cache, kv.v_cache, "kv.k_cache", "kv.v_cache", q)
    indptr, indices = check_page_table(kv.page_indptr, kv.page_indices, k.shape[0], k.device, "kv.", validate)
    return k, v, indptr, indices


def check_pools(
    k_cache: object, v_cache: object, k_name: str, v_name: str, like: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the pools of keys and values if they fit together."""
    k = check_tensor(k_cache, k_name, like)
    v = check_tensor(v_cache, v_name, k if like is None else like)
    if k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"{k_name} must be [num_pages, page_size, num_kv_heads, head_dim] and {v_name} [num_pages, "
            f"page_size, num_kv_heads, head_dim_v], got {list(k.shape)} and {list(v.shape)}; "
            "other layouts are views, for example pool[:, 0] or k.transpose(1, 2)"
        )
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"{k_name} and {v_name} must have the same num_pages, page_size and num_kv_heads, got "
            f"{list(k.shape)} and {list(v.shape)}; only the last size may differ"
        )
    if k.shape[1] < 1:
        raise ValueError(
            f"{k_name} must have a page_size of at least 1, got shape {list(k.shape)}; "
            "a pool without tokens has num_pages 0"
        )
    return k, v


def check_page_table(
    page_indptr: object, page_indices: object, num_pages: int, device: torch.device, prefix: str,
    validate: bool,
) -> tuple[IntArray, Tensor]:  # fmt: skip
    """Return offsets int64 on the host, and page numbers int32 on `device`.

    Page numbers on the host are checked against `num_pages`; those on the device only if `validate`.
    """
    name = f"{prefix}page_indices"
    indices = check_page_indices(page_indices, name, num_pages, device, validate)
    indptr = check_offsets(page_indptr, f"{prefix}page_indptr")
    if indptr[-1] != indices.numel():
        raise ValueError(
            f"{prefix}page_indptr must end with the number of entries in {name}, {indices.numel()}, got "
            f"{indptr[-1]}; cut the table or correct the offsets"
        )
    if indptr[-1] > 0 and num_pages == 0:
        raise ValueError(
            f"{prefix}page_indptr must give no node room for a page while the pool has none, got "
            f"{indptr[-1]} entries; make a pool with pages"
        )
    return indptr, indices


def check_page_indices(
    page_indices: object, name: str, num_pages: int, device: torch.device, validate: bool
) -> Tensor:
    """Return page numbers, int32 on `device`."""
    if on_device(page_indices):
        indices = _check_device(page_indices, name, device)
        if validate:
            _check_range(as_int_vector(indices.cpu(), name), name, num_pages)
        return indices
    array = as_int_vector(page_indices, name)
    _check_range(array, name, num_pages)
    host = torch.from_numpy(array.astype(np.int32))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _check_device(page_indices: Tensor, name: str, device: torch.device) -> Tensor:
    if page_indices.device != device:
        raise ValueError(
            f"{name} must be on the host or on the device of the pool, {device}, got {page_indices.device}; "
            "move it with .to(device)"
        )
    if page_indices.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {page_indices.dtype}; convert it with .int()")
    if page_indices.dim() != 1 or not page_indices.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous vector, got shape {list(page_indices.shape)} with strides "
            f"{list(page_indices.stride())}; a table [num_nodes, max_pages] is given as table.view(-1), with "
            "page_indptr = range(0, table.numel() + 1, max_pages)"
        )
    return page_indices


def _check_range(indices: IntArray, name: str, num_pages: int) -> None:
    if indices.size and not 0 <= indices.min() <= indices.max() < num_pages:
        at = int(np.argmax((indices < 0) | (indices >= num_pages)))
        raise ValueError(
            f"{name} must hold numbers of pages, 0 to {num_pages - 1}, got {indices[at]} at index {at}; "
            "correct the page table"
        )

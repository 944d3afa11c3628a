"""Offsets and page tables that a plan was made for, and whether a run names the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from hydragen.host_ints import IntArray, as_int_vector
from hydragen.kv import KV, PackedKV, PagedKV
from hydragen.lengths import on_device
from hydragen.validation.tensors import kind


class Table(NamedTuple):
    """Offsets or page numbers, as given; on the host, also what they were when they were given."""

    given: object
    values: IntArray | None


Tables = tuple[Table | None, ...]


def tables_of(kv: KV) -> Tables:
    """Return the tables of keys and values that have been checked: of all nodes, or one per level."""
    if isinstance(kv, PagedKV):
        return (_table(kv.page_indptr), _table(kv.page_indices))
    if isinstance(kv, PackedKV):
        return (_table(kv.cu_seqlens_k),)
    return tuple(_table(level.cu_seqlens_k) if isinstance(level, PackedKV) else None for level in kv)


def with_page_indices(tables: Tables, page_indices: object) -> Tables:
    """Return the tables of a pool with other page numbers, which have been checked."""
    return (tables[0], _table(page_indices))


def _table(given: object) -> Table:
    return Table(given, None if on_device(given) else as_int_vector(given, "kv").copy())


def tensors_of(kv: object, tables: Tables, num_levels: int | None) -> list[tuple[object, object]]:
    """Return the pair of keys and values of each level of one layer, or of all nodes.

    Parameters
    ----------
    kv : as given to `Plan.run`
    tables : those of the plan
    num_levels : int or None
        Levels of the plan; None if it was made for packed tensors or a pool.
    """
    if isinstance(kv, (PackedKV, PagedKV)):
        return [_of_all_nodes(kv, tables, num_levels)]
    if isinstance(kv, str) or not isinstance(kv, Sequence):
        raise TypeError(
            f"kv must be as the plan was made for, tensors in pairs (k, v), got {kind(kv)}; of a pool in one "
            "tensor pass (pool[:, 0], pool[:, 1])"
        )
    if num_levels is None:
        if len(kv) != 2:
            raise ValueError(
                f"kv must be a pair (k, v) of the planned shapes, got {len(kv)} entries; "
                "pass the tensors of one layer"
            )
        return [(kv[0], kv[1])]
    if len(kv) != num_levels:
        raise ValueError(
            f"kv must have the levels that the plan was made for, {num_levels}, got {len(kv)}; plan anew"
        )
    pairs: list[tuple[object, object]] = []
    for i, level in enumerate(kv):
        if isinstance(level, PackedKV):
            if tables[i] is None:
                raise ValueError(
                    f"kv[{i}] must be padded, as the plan was made for, got a PackedKV; pass a pair (k, v)"
                )
            _check_same(level.cu_seqlens_k, tables[i], f"kv[{i}].cu_seqlens_k")
            pairs.append((level.k, level.v))
        elif isinstance(level, Sequence) and not isinstance(level, str) and len(level) == 2:
            pairs.append((level[0], level[1]))
        else:
            raise TypeError(f"kv[{i}] must be a pair (k, v), got {kind(level)}; pass [(k, v), ...]")
    return pairs


def _of_all_nodes(kv: PackedKV | PagedKV, tables: Tables, num_levels: int | None) -> tuple[object, object]:
    planned = (
        "a list of levels" if num_levels is not None else "a PackedKV" if len(tables) == 1 else "a PagedKV"
    )
    if planned != f"a {type(kv).__name__}":
        raise ValueError(
            f"kv must be as the plan was made for, {planned}, got a {type(kv).__name__}; pass the tensors of "
            "one layer in pairs (k, v)"
        )
    if isinstance(kv, PackedKV):
        _check_same(kv.cu_seqlens_k, tables[0], "kv.cu_seqlens_k")
        return kv.k, kv.v
    _check_same(kv.page_indptr, tables[0], "kv.page_indptr")
    _check_same(kv.page_indices, tables[1], "kv.page_indices")
    return kv.k_cache, kv.v_cache


def _check_same(given: object, planned: Table | None, name: str) -> None:
    """Raise unless `given` is the same memory on a device, or the same integers on the host.

    A list or an array may have been changed since, so on the host the planned object itself is no proof.
    """
    if planned is None or (given is planned.given and planned.values is None):
        return
    if on_device(given) or planned.values is None:
        same = _memory(given) == _memory(planned.given)
    else:
        same = np.array_equal(as_int_vector(given, name), planned.values)
    if not same:
        raise ValueError(
            f"{name} must be what the plan was made for or last updated with, got another; pass the pair "
            "(k, v) alone, and what has changed to Plan.update"
        )


def _memory(x: object) -> tuple[object, ...]:
    return (x.device, x.dtype, x.data_ptr(), x.shape, x.stride()) if isinstance(x, Tensor) else (id(x),)

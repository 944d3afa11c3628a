"""Other ways to read what a PrefixCache holds, for the benchmark to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import numpy as np
from torch import Tensor

from hydragen.kv import PackedKV
from hydragen.transformers import attention as layer_attention
from hydragen.transformers.layers import PrefixLayer
from hydragen.tree import PrefixTree


@contextmanager
def attention_replaced(other: Callable[[PrefixLayer, Tensor, dict[str, Any]], Tensor]) -> Iterator[None]:
    """Let models read what a PrefixCache holds by `other`."""
    usual = layer_attention.read_levels
    layer_attention.read_levels = other  # type: ignore[assignment]  # replaced on purpose
    try:
        yield
    finally:
        layer_attention.read_levels = usual


def switched_off(layer: PrefixLayer, q: Tensor, _: dict[str, Any]) -> Tensor:
    """Attention switched off: the queries in place of the result, no work unless heads change their size.

    Not zeros: matrix products of zeros draw less power, and run faster for it.
    """
    tail = layer.kv()[-1]
    head_dim_v = (tail.v if isinstance(tail, PackedKV) else tail[1]).shape[-1]
    return q if q.shape[-1] == head_dim_v else q.new_ones(*q.shape[:-1], head_dim_v)


@lru_cache(maxsize=4)
def _apart(tree: PrefixTree) -> PrefixTree:
    """Return the tree in which each row has a prefix of its own, and its tail under that."""
    size = tree.num_nodes - 1
    parents = np.append(np.full(size, -1), np.arange(size))
    return PrefixTree.from_parents(parents, row_to_node=tree.row_to_node + size - 1)


def per_sequence(layer: PrefixLayer, q: Tensor, options: dict[str, Any]) -> Tensor:
    """Attention with sharing switched off: the same keys, in place, as a segment of each row's own.

    Decode steps over one shared prefix; others are read as usual.
    """
    rows, kv = layer.rows, layer.kv()
    if rows.step.plans is None or len(kv) != 2 or rows.levels[0].lens.size != 1:
        return layer_attention.read_as_usual(layer, q, options)
    prefix = kv[0]
    k, v = (prefix.k[None], prefix.v[None]) if isinstance(prefix, PackedKV) else prefix
    level = k.expand(rows.size, -1, -1, -1), v.expand(rows.size, -1, -1, -1)
    apart = _apart(rows.step.tree)
    lens = [np.repeat(rows.levels[0].lens, rows.size), rows.lens_on_device]
    plan = rows.step.plans.get(apart, [level, kv[1]], q.shape[2], lens)
    return cast("Tensor", plan.run(q, [level, kv[1]], **options))


@lru_cache(maxsize=4)
def _first_level_shared(size: int) -> PrefixTree:
    """Return the tree of a root, a node for each row under it, and its tail under that."""
    parents = np.concatenate([[-1], np.zeros(size, np.int64), np.arange(1, size + 1)])
    return PrefixTree.from_parents(parents, row_to_node=np.arange(size + 1, 2 * size + 1))


class FirstLevelOnly:
    """Sharing of the first level only: every row has a copy of its own of the second.

    The copies of all layers would not fit: one layer's are read in the place of every layer's, which takes as
    long, and the tokens that come out mean nothing.
    """

    def __init__(self) -> None:
        self.copies: tuple[Tensor, Tensor] | None = None

    def __call__(self, layer: PrefixLayer, q: Tensor, options: dict[str, Any]) -> Tensor:
        """Attend as `read_levels` does."""
        rows, kv = layer.rows, layer.kv()
        if rows.step.plans is None or len(kv) != 3:
            return layer_attention.read_as_usual(layer, q, options)
        if self.copies is None:
            second = rows.levels[1]
            lens, level = second.lens, kv[1]
            k, v = (level.k, level.v) if isinstance(level, PackedKV) else (x.flatten(0, 1) for x in level)
            shape = len(lens), int(lens[0])
            nodes = rows.parents.tolist()
            self.copies = k.unflatten(0, shape)[nodes], v.unflatten(0, shape)[nodes]
        tree = _first_level_shared(rows.size)
        now = [rows.levels[0].lens, rows.levels[1].lens[rows.parents], rows.lens_on_device]
        levels = [kv[0], self.copies, kv[2]]
        plan = rows.step.plans.get(tree, levels, q.shape[2], now)
        return cast("Tensor", plan.run(q, levels, **options))

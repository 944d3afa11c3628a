"""Where the tokens of a cache lie: levels that are shared and stay, and tails that grow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hydragen.host_ints import IntArray, frozen
from hydragen.kv import PackedKV


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each row's tail begins in one flat tensor, and how much fits: int64 [rows] each."""

    starts: IntArray
    capacity: IntArray

    @classmethod
    def of(cls, capacity: IntArray) -> Layout:
        """Lay the tails end to end."""
        return cls(frozen(np.cumsum(capacity) - capacity), frozen(capacity.copy()))

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.starts.size

    @property
    def total(self) -> int:
        """Tokens that fit in all rows together."""
        return int(self.capacity.sum())

    def as_kv(self, k: Tensor, v: Tensor) -> PackedKV | tuple[Tensor, Tensor]:
        """View flat tensors [total, heads, dim] as a level: padded if rows are of one size, else packed."""
        if self.size and (self.capacity == self.capacity[0]).all():
            shape = self.size, int(self.capacity[0])
            return k.unflatten(0, shape), v.unflatten(0, shape)
        return PackedKV(k, v, np.append(self.starts, self.total))

    def moves(self, old: Layout, lens: IntArray, rows: IntArray | None = None) -> tuple[Tensor, Tensor]:
        """Return flat indices (in `old`, here) that bring the lens[r] tokens of row r = rows[i] to row i."""
        rows = np.arange(self.size) if rows is None else rows
        counts = lens[rows]
        rank = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        source, target = np.repeat(old.starts[rows], counts) + rank, np.repeat(self.starts, counts) + rank
        return torch.from_numpy(source), torch.from_numpy(target)


@dataclass(frozen=True, eq=False)
class Level:
    """A level of the tree of shared tokens; read only from the moment it is made.

    Attributes
    ----------
    parents : int64 [nodes]
        Each node's parent, counted within the level above; -1 in the first.
    lens : int64 [nodes]
        Tokens in each node.
    kv : per layer, PackedKV or (k, v)
    """

    parents: IntArray
    lens: IntArray
    kv: tuple[PackedKV | tuple[Tensor, Tensor], ...]


def path_lens(levels: tuple[Level, ...], parents: IntArray) -> IntArray:
    """Tokens on the shared path of rows that hang under nodes `parents` of the last level, int64 [rows]."""
    lens = np.zeros(1, dtype=np.int64)
    for level in levels:
        lens = level.lens + (lens[level.parents] if (level.parents >= 0).all() else 0)
    return lens[parents] if levels else np.zeros(parents.size, dtype=np.int64)

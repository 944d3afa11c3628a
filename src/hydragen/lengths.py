"""How many tokens each node holds: lengths on the host, which are checked, or on the device, which never are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hydragen.host_ints import IntArray, as_int_vector
from hydragen.kv import NodeKV
from hydragen.tree import PrefixTree


@dataclass(frozen=True, eq=False)
class KVLens:
    """Lengths of all nodes.

    Attributes
    ----------
    host : int64 [num_nodes] or None
        Known lengths; None if any of them lives on the device.
    parts : (nodes, lengths) pairs
        Where `host` is None: lengths of these nodes, a tensor on q's device or an int64 array.
    """

    host: IntArray | None
    parts: tuple[tuple[IntArray, Tensor | IntArray], ...] = ()

    def on(self, device: torch.device, capacity: IntArray) -> Tensor:
        """Return all lengths, int32 [num_nodes] on `device`, clamped to 0 and the capacity; does not wait for it."""
        limits = torch.from_numpy(capacity).to(torch.int32)
        if self.host is not None:
            return torch.from_numpy(self.host).to(torch.int32).to(device, non_blocking=True)
        lens = limits.to(device, non_blocking=True)
        limits_there = lens
        for nodes, part in self.parts:
            given = part if isinstance(part, Tensor) else torch.from_numpy(part)
            given = given.to(device=device, dtype=torch.int32, non_blocking=True)
            if nodes.size == capacity.size:
                lens = given
            else:
                where = torch.from_numpy(nodes).to(device, non_blocking=True)
                lens = lens.index_copy(0, where, given)
        return torch.minimum(lens.clamp(min=0), limits_there)


def check_kv_lens(
    kv_lens: object, tree: PrefixTree, nodes: NodeKV, device: torch.device, validate: bool
) -> KVLens:
    """Check `kv_lens` against the nodes' capacities; without it the tree's lengths count, else the capacities."""
    everything = np.arange(tree.num_nodes)
    if kv_lens is None:
        if tree.kv_lens is None:
            return KVLens(nodes.capacity)
        _check_host(tree.kv_lens, everything, nodes, "tree.kv_lens")
        return KVLens(tree.kv_lens)
    if nodes.packed:
        given = [(everything, kv_lens, "kv_lens")]
    else:
        given = _by_level(kv_lens, tree, nodes)
    parts: list[tuple[IntArray, Tensor | IntArray]] = []
    for indices, lens, name in given:
        if isinstance(lens, Tensor) and lens.device.type != "cpu":
            parts.append((indices, _check_device(lens, indices, nodes, name, device, validate)))
        else:
            array = as_int_vector(lens, name)
            _check_host(array, indices, nodes, name)
            parts.append((indices, array))
    if any(isinstance(lens, Tensor) for _, lens in parts):
        return KVLens(None, tuple(parts))
    host = nodes.capacity.copy()
    for indices, lens in parts:
        host[indices] = lens
    return KVLens(host)


def _by_level(kv_lens: object, tree: PrefixTree, nodes: NodeKV) -> list[tuple[IntArray, object, str]]:
    num_levels = len(nodes.k)
    if isinstance(kv_lens, Tensor) or not isinstance(kv_lens, Sequence) or len(kv_lens) != num_levels:
        count = f" of {len(kv_lens)} entries" if isinstance(kv_lens, Sequence) else ""
        raise ValueError(
            f"kv_lens must be a list with one entry per level of kv, {num_levels}, each None or one length per node, "
            f"got {type(kv_lens).__name__}{count}; pass for example [None, suffix_lens]"
        )
    levels = tree.level_nodes
    return [(levels[i], lens, f"kv_lens[{i}]") for i, lens in enumerate(kv_lens) if lens is not None and i < len(levels)]


def _check_host(lens: IntArray, indices: IntArray, nodes: NodeKV, name: str) -> None:
    if lens.size != indices.size:
        raise ValueError(f"{name} must have one length per node, {indices.size}, got {lens.size}; empty nodes count too")
    if lens.size and lens.min() < 0:
        at = int(lens.argmin())
        raise ValueError(f"{name} must not be negative, got {lens[at]} at index {at}; an empty node has length 0")
    capacity = nodes.capacity[indices]
    if (lens > capacity).any():
        at = int(np.flatnonzero(lens > capacity)[0])
        raise ValueError(
            f"{name} must not exceed the tokens that kv holds for each node, got {lens[at]} at index {at} where kv has "
            f"{capacity[at]}; shorten it or pass more KV"
        )


def _check_device(
    lens: Tensor, indices: IntArray, nodes: NodeKV, name: str, device: torch.device, validate: bool
) -> Tensor:
    if lens.device != device:
        raise ValueError(
            f"{name} must be on the host or on the device of q, {device}, got {lens.device}; move it with .to(device)"
        )
    if lens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {lens.dtype}; convert it with .int()")
    if lens.shape != (indices.size,):
        raise ValueError(f"{name} must have shape [{indices.size}], one length per node, got {list(lens.shape)}; reshape it")
    if validate:
        _check_host(as_int_vector(lens.cpu(), name), indices, nodes, name)
    return lens

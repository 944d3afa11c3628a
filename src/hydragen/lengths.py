"""How many tokens each node holds: on the host, and then checked, or on the device, and then never read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

from hydragen.host_ints import IntArray, as_int_vector
from hydragen.kv import NodeKV
from hydragen.tree import PrefixTree


class KVLens(NamedTuple):
    """Lengths of all nodes.

    Attributes
    ----------
    planned : int64 [num_nodes]
        Length of each node; of nodes whose length lives on the device, the capacity.
    on_device : (nodes, lengths) pairs
        int64 indices of nodes, and their lengths: an int32 or int64 tensor on q's device.
    """

    planned: IntArray
    on_device: tuple[tuple[IntArray, Tensor], ...] = ()

    def unclamped(self, planned: Tensor) -> Tensor | None:
        """Return all lengths, int32 [num_nodes], as given, in at most one launch; None if that cannot be.

        `planned` is `self.planned` on q's device, int32.
        """
        if len(self.on_device) != 1:
            return None
        nodes, given = self.on_device[0]
        first, end = int(nodes[0]), int(nodes[-1]) + 1
        if given.dtype != torch.int32 or end - first != nodes.size:
            return None
        if nodes.size == self.planned.size:
            return given if given.is_contiguous() else None
        return torch.cat([planned[:first], given, planned[end:]])

    def clamped(self, planned: Tensor, index_of: Callable[[IntArray], Tensor | slice]) -> Tensor:
        """Return all lengths, int32 [num_nodes], those on the device clamped to 0 and the capacity.

        Parameters
        ----------
        planned : int32 [num_nodes]
            `self.planned` on q's device.
        index_of : callable
            Where nodes are among all nodes, as `node_index` says it.
        """
        lens = planned.clone()
        for nodes, given in self.on_device:
            index = index_of(nodes)
            if isinstance(index, slice):
                part = lens[index]
                # not by out=: for CUDA that narrows to int32 before the minimum is taken
                part.copy_(torch.minimum(given.clamp(min=0), part))
            else:
                lens.index_copy_(0, index, torch.minimum(given.clamp(min=0), lens[index]).to(torch.int32))
        return lens

    def levels_on_device(self, tree: PrefixTree, nodes: NodeKV) -> frozenset[int]:
        """Return the levels whose lengths are on the device; 0 where all nodes lie in one tensor."""
        return frozenset(int(tree.depth[of[0]]) if nodes.by_level else 0 for of, _ in self.on_device)

    def growing(
        self, levels: frozenset[int], tree: PrefixTree, nodes: NodeKV, device: torch.device
    ) -> KVLens:
        """Return the same lengths, those of `levels` as such that may grow up to the nodes' capacities."""
        planned, there = self.planned.copy(), list(self.on_device)
        for level in sorted(levels - self.levels_on_device(tree, nodes)):
            if not nodes.by_level:
                group = np.arange(tree.num_nodes)
            elif level < len(tree.level_nodes):
                group = tree.level_nodes[level]
            else:
                continue
            if group.size:
                there.append((group, torch.from_numpy(planned[group].astype(np.int32)).to(device)))
                planned[group] = nodes.capacity[group]
        return KVLens(planned, tuple(there))


def node_index(nodes: IntArray, uploads: dict[Any, Any], device: torch.device) -> Tensor | slice:
    """Return where `nodes` are: neighbours in a slice, others as int64 on the device, kept in `uploads`."""
    first, end = int(nodes[0]), int(nodes[-1]) + 1
    if end - first == nodes.size:
        return slice(first, end)
    key = ("nodes", nodes.tobytes(), device)
    index = uploads.get(key)
    if index is None:
        with torch.inference_mode(False):  # it outlives the mode
            index = uploads[key] = torch.from_numpy(nodes.copy()).to(device)
    kept: Tensor = index
    return kept


def on_device(lens: object) -> TypeGuard[Tensor]:
    """Whether lengths or offsets live where reading them would make the host wait."""
    return isinstance(lens, Tensor) and lens.device.type != "cpu"


def check_kv_lens(
    kv_lens: object,
    tree: PrefixTree,
    nodes: NodeKV,
    device: torch.device,
    validate: bool,
    *,
    may_grow: bool = False,
) -> KVLens:
    """Check `kv_lens` against the nodes' capacities; None: the tree's lengths, or else the capacities.

    With `may_grow`, tensors on `device` are taken as lengths on a device even if that is a CPU: so that a
    plan for lengths that grow is written in one way for all devices.
    """
    if kv_lens is None:
        if tree.kv_lens is None:
            return KVLens(nodes.capacity)
        _check_host(tree.kv_lens, nodes.capacity, "tree.kv_lens")
        return KVLens(tree.kv_lens)
    if nodes.by_level:
        given = _by_level(kv_lens, tree, nodes)
    else:
        given = [(np.arange(tree.num_nodes), kv_lens, "kv_lens")]
    planned = nodes.capacity.copy()
    there = []
    for indices, lens, name in given:
        capacity = nodes.capacity[indices]
        if on_device(lens) or (may_grow and isinstance(lens, Tensor)):
            _check_device(lens, capacity, name, device, validate or not on_device(lens))
            if indices.size:
                there.append((indices, lens))
        else:
            array = as_int_vector(lens, name)
            _check_host(array, capacity, name)
            planned[indices] = array
    return KVLens(planned, tuple(there))


def _by_level(kv_lens: object, tree: PrefixTree, nodes: NodeKV) -> list[tuple[IntArray, object, str]]:
    num_levels = len(nodes.k)
    expected = f"kv_lens must be a list with one entry per level of kv, {num_levels}"
    remedy = "an entry is None (all tokens) or one length per node, for example [None, suffix_lens]"
    if isinstance(kv_lens, str) or not isinstance(kv_lens, Sequence):
        raise TypeError(f"{expected}, got {type(kv_lens).__name__}; {remedy}")
    if len(kv_lens) != num_levels:
        raise ValueError(f"{expected}, got {len(kv_lens)} entries; {remedy}")
    levels = tree.level_nodes
    nobody = np.zeros(0, np.int64)  # levels below the tree have no nodes
    return [
        (levels[i] if i < len(levels) else nobody, lens, f"kv_lens[{i}]")
        for i, lens in enumerate(kv_lens)
        if lens is not None
    ]


def _check_host(lens: IntArray, capacity: IntArray, name: str) -> None:
    if lens.size != capacity.size:
        raise ValueError(
            f"{name} must have one length per node, {capacity.size}, got {lens.size}; empty nodes count too"
        )
    if not lens.size or (lens.min() >= 0 and (lens <= capacity).all()):
        return
    at = int(lens.argmin())
    if lens[at] < 0:
        raise ValueError(
            f"{name} must not be negative, got {lens[at]} at index {at}; an empty node has length 0"
        )
    at = int((lens > capacity).argmax())
    raise ValueError(
        f"{name} must not exceed the tokens that kv holds for each node, got {lens[at]} at index {at} "
        f"where kv has {capacity[at]}; shorten it or pass more KV"
    )


def _check_device(lens: Tensor, capacity: IntArray, name: str, device: torch.device, validate: bool) -> None:
    if lens.device != device:
        raise ValueError(
            f"{name} must be on the host or on the device of q, {device}, got {lens.device}; "
            "move it with .to(device)"
        )
    if lens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {lens.dtype}; convert it with .int()")
    if lens.shape != capacity.shape:
        raise ValueError(
            f"{name} must have shape [{capacity.size}], one length per node, got {list(lens.shape)}; "
            "empty nodes count too"
        )
    if validate:
        _check_host(as_int_vector(lens.cpu(), name), capacity, name)

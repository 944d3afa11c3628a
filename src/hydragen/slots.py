"""Where a plan appends new tokens: at fixed addresses, computed on the device from lengths."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hydragen.backends.appends import Slots
from hydragen.backends.uploads import Uploaded
from hydragen.host_ints import IntArray
from hydragen.validation.append import last_level
from hydragen.validation.planned import Planned


class Growth(NamedTuple):
    """Lengths of all nodes before and since the last update, on the device; the page table of a pool."""

    before: Tensor
    lens: Tensor
    pages: Tensor | None


class SlotTables:
    """The slots of each level in which rows have ended, with what they are computed from.

    A captured graph appends to the level that was the rows' last when it was captured. When rows end
    elsewhere, or at nodes of which they have none of their own, that level's rows lose their room: the graph
    then writes nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._levels: dict[int, tuple[Uploaded, Slots]] = {}
        self._current: int | None = None

    def find(self, planned: Planned, growth: Growth) -> Slots:
        """Return where the newest tokens go; ValueError if rows do not end at places of their own."""
        if self._current is None:
            arrays, level = row_arrays(planned), last_level(planned.tree, planned.nodes)
            if level not in self._levels:
                with torch.inference_mode(False):  # it outlives the mode
                    rows = Uploaded(arrays, self._device)
                    self._levels[level] = rows, self._slots(planned, rows, level, growth)
            self._current = level
        return self._levels[self._current][1]

    def set_rows(self, planned: Planned) -> None:
        """Take over where rows end now; `refresh` is next."""
        self._current = None
        if not self._levels:
            return
        try:
            arrays, level = row_arrays(planned), last_level(planned.tree, planned.nodes)
        except ValueError:  # which is said at the next `append`
            arrays, level = [], -1
        for index, (rows, _) in self._levels.items():
            if index == level:
                rows.replace(arrays)
                self._current = level
            else:
                rows.replace([np.zeros(part.numel(), np.int64) for part in rows.parts])

    def refresh(self, planned: Planned, growth: Growth) -> None:
        """Compute all slots anew, into the same memory."""
        for level, (rows, old) in self._levels.items():
            new = self._slots(planned, rows, level, growth)
            for there, value in zip(old.tensors(), new.tensors(), strict=True):
                there.copy_(value)

    def _slots(self, planned: Planned, rows: Uploaded, level: int, growth: Growth) -> Slots:
        node, slot, capacity = (x.long()[:, None] for x in rows.parts)
        old, new = growth.before.long()[node], growth.lens.long()[node]  # [num_rows, 1]
        # A token without room, or that its row has not grown by, is not written: it repeats the write of
        # one that is. So no two writes to one place differ, and none depends on their order; a row that
        # has not grown may even share its pages with others. If none is written, each repeats what is there.
        q_len = planned.q_shape[1]
        index = torch.arange(q_len, device=self._device)
        written = index < torch.minimum(new, capacity) - old  # [num_rows, q_len]
        position = torch.where(written, old + index, 0)
        tokens = torch.arange(node.shape[0], device=self._device)[:, None] * q_len + index
        places = _places(planned, planned.nodes.packed[level], slot, position, growth.pages)
        if not written.numel():
            return Slots(places, tokens, written)
        # as a vector of one: a number would be read back from the device
        first = written.flatten().to(torch.int32).argmax()[None]
        chosen = [torch.where(written, x, x.flatten().index_select(0, first)) for x in (*places, tokens)]
        return Slots(tuple(chosen[:-1]), chosen[-1], written.any().expand_as(written).clone())


def _places(
    planned: Planned, packed: bool, slot: Tensor, position: Tensor, table: Tensor | None
) -> tuple[Tensor, ...]:
    pages = planned.nodes.pages
    if pages is not None and table is not None:
        page = table[slot + position // pages.size].long().clamp(0, max(pages.num_pages - 1, 0))
        return page, position % pages.size
    if packed:
        return (slot + position,)
    return slot.expand_as(position).clone(), position


def row_arrays(planned: Planned) -> list[IntArray]:
    """Return the node at which each row ends, its slot and its capacity.

    Raise unless every row ends at a node of its own, and all of these lie in one tensor. Rows at nodes
    without room have finished: nothing is written for them, wherever they end.
    """
    ends, nodes = planned.tree.row_to_node, planned.nodes
    writing = nodes.capacity[ends] > 0
    own = ends[writing]
    if np.unique(own).size != own.size:
        raise ValueError(
            "append needs every row to end at a node of its own, or writes would overlap, got rows that "
            "share one; fork the tree (PrefixTree.fork)"
        )
    shared = _above(planned.tree.parents, ends)[ends] & writing
    if shared.any():
        at = int(shared.argmax())
        raise ValueError(
            f"append needs every row to end at a node to which no other row attends, got row {at} at node "
            f"{ends[at]}, above another row's; give it an empty node below"
        )
    if ends.size and not own.size:
        raise ValueError(
            f"append needs room in the node of some row, got none in any, {ends[0]} of row 0 for one; give "
            "nodes capacity"
        )
    if np.unique(nodes.level[own]).size > 1:
        raise ValueError(
            "append needs all rows to end in one level, got several; insert empty nodes, or pack all nodes "
            "in one PackedKV or PagedKV"
        )
    # where nothing is written there may not even be a place
    return [ends, np.where(writing, nodes.slot[ends], nodes.slot[own[:1]]), nodes.capacity[ends]]


def _above(parents: IntArray, ends: IntArray) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return for each node whether it lies above one of `ends`."""
    above = np.zeros(parents.size, dtype=np.bool_)
    nodes = np.unique(parents[ends])
    while (nodes := nodes[nodes >= 0]).size:
        nodes = nodes[~above[nodes]]
        above[nodes] = True
        nodes = np.unique(parents[nodes])
    return above

"""What a plan keeps on its device at fixed addresses, where captured graphs find it at every replay."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hydragen.backends.tokens import Tokens, find_tokens, planned_lens
from hydragen.backends.uploads import Uploaded
from hydragen.host_ints import IntArray
from hydragen.kv import NodeKV
from hydragen.lengths import KVLens
from hydragen.validation.planned import Planned
from hydragen.work import WorkPlan


class Slots(NamedTuple):
    """Where the newest tokens of each row go, [num_rows, q_len] each.

    Attributes
    ----------
    place : one or two int64 tensors
        Indices into the first dimensions of a level, packed tensor or pool.
    source : int64
        Which of all new tokens, row after row, is written there.
    fresh : bool
        Whether anything is written at all; if not, what is there is written once more.
    """

    place: tuple[Tensor, ...]
    source: Tensor
    fresh: Tensor


class PlanState:
    """Lengths, page numbers, positions and slots of a plan.

    Everything is computed on the device in the order of the stream, and overwritten in place.
    """

    def __init__(self, planned: Planned, work: WorkPlan, lens: KVLens, reserve: float) -> None:
        self.device = planned.like.device
        self.kv_lens: Tensor | None = None
        self.pages: Tensor | None = None
        self._before: Tensor | None = None
        self._tokens: dict[bool, Tokens] = {}
        self._slots: Slots | None = None
        self._rows: Uploaded | None = None
        with torch.inference_mode(False):  # what a plan owns outlives the mode in which it is made
            if planned.nodes.pages is not None:
                entries = planned.nodes.pages.indices
                self.pages = entries.new_zeros(math.ceil(reserve * entries.numel()))
                self.set_pages(entries)
            self.set_lens(planned, work, lens)

    def set_lens(self, planned: Planned, work: WorkPlan, lens: KVLens, *, grown: bool = True) -> None:
        """Take over new lengths; if nodes have `grown`, what lies between old and new is to be written."""
        if not work.lens_on_device:
            return
        constant = planned_lens(work, self.device)
        if (lens.planned != work.kv_lens).any():
            given = constant.clone()
            given[: lens.planned.size].copy_(Uploaded([lens.planned], self.device).parts[0])
            constant = given
        clamped = lens.clamped(constant, work.uploads)
        if self.kv_lens is None or self._before is None:
            self.kv_lens, self._before = clamped, clamped.clone()
        else:
            self._before.copy_(self.kv_lens if grown else clamped)
            self.kv_lens.copy_(clamped)
        self.refresh(planned, work)

    def set_pages(self, indices: Tensor) -> None:
        """Take over other page numbers."""
        room = 0 if self.pages is None else self.pages.numel()
        if self.pages is None or indices.numel() > room:
            raise ValueError(
                f"kv must fit the plan's page table of {room} entries, got {indices.numel()}; "
                "plan with a larger reserve"
            )
        self.pages[: indices.numel()].copy_(indices)

    def set_rows(self, planned: Planned) -> None:
        """Take over where rows end now."""
        if self._rows is None:
            return
        try:
            self._rows.replace(_row_arrays(planned))
        except ValueError:  # which is said at the next `append`
            self._rows = self._slots = None

    def refresh(self, planned: Planned, work: WorkPlan) -> None:
        """Compute what follows from lengths, pages and offsets anew, into the same memory."""
        for masked, old in self._tokens.items():
            _overwrite(old, self._find(planned, work, masked))
        if self._slots is not None:
            new = self._find_slots(planned)
            _overwrite((*self._slots.place, *self._slots[1:]), (*new.place, *new[1:]))

    def tokens(self, planned: Planned, work: WorkPlan, masked: bool) -> Tokens:
        """Return where query tokens and keys are."""
        found = self._tokens.get(masked)
        if found is None:
            with torch.inference_mode(False):
                found = self._tokens[masked] = self._find(planned, work, masked)
        return found

    def slots(self, planned: Planned) -> Slots:
        """Return where the newest tokens go."""
        if self._slots is None:
            with torch.inference_mode(False):
                self._slots = self._find_slots(planned)
        return self._slots

    def _find(self, planned: Planned, work: WorkPlan, masked: bool) -> Tokens:
        offsets, total = planned.rows.cu_seqlens_q, planned.q_shape[0]
        return find_tokens(work, self.kv_lens, offsets, total, masked, self.device)

    def _find_slots(self, planned: Planned) -> Slots:
        lens, before = self.kv_lens, self._before
        if lens is None or before is None:
            raise ValueError(
                "append needs a plan whose lengths may grow, got one for fixed lengths; plan with kv_lens in "
                "tensors"
            )
        if self._rows is None:
            self._rows = Uploaded(_row_arrays(planned), self.device)
        node, slot, capacity = (x.long()[:, None] for x in self._rows.parts)
        old, new = before.long()[node], lens.long()[node]  # [num_rows, 1]
        # A token without room, or that its row has not grown by, is not written: it repeats the write of
        # one that is. So no two writes to one place differ, and none depends on their order; a row that
        # has not grown may even share its pages with others. If none is written, each repeats what is there.
        q_len = planned.q_shape[1]
        index = torch.arange(q_len, device=self.device)
        written = index < torch.minimum(new, capacity) - old  # [num_rows, q_len]
        position = torch.where(written, old + index, 0)
        tokens = torch.arange(node.shape[0], device=self.device)[:, None] * q_len + index
        ends = planned.tree.row_to_node
        packed = planned.nodes.packed[int(planned.nodes.level[ends[0]]) if ends.size else 0]
        places = self._places(planned.nodes, packed, slot, position)
        if not written.numel():
            return Slots(places, tokens, written)
        # as a vector of one: a number would be read back from the device
        first = written.flatten().to(torch.int32).argmax()[None]
        chosen = [torch.where(written, x, x.flatten().index_select(0, first)) for x in (*places, tokens)]
        return Slots(tuple(chosen[:-1]), chosen[-1], written.any().expand_as(written).clone())

    def _places(self, nodes: NodeKV, packed: bool, slot: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        if nodes.pages is not None and self.pages is not None:
            size, num_pages = nodes.pages.size, nodes.pages.num_pages
            page = self.pages[slot + position // size].long().clamp(0, num_pages - 1)
            return page, position % size
        if packed:
            return (slot + position,)
        return slot.expand_as(position).clone(), position


def _row_arrays(planned: Planned) -> list[IntArray]:
    """Return the node at which each row ends, its slot and its capacity.

    Raise unless every row ends at a node of its own, with room, and all of these lie in one tensor.
    """
    ends, nodes = planned.tree.row_to_node, planned.nodes
    if len(planned.q_shape) != 4:
        raise ValueError(
            f"append needs queries in a batch [num_rows, q_len, ...], got a plan for packed ones, "
            f"{list(planned.q_shape)}; write to the tensors yourself"
        )
    if np.unique(ends).size != ends.size:
        raise ValueError(
            "append needs every row to end at a node of its own, or writes would overlap, got rows that "
            "share one; fork the tree (PrefixTree.fork)"
        )
    if ends.size and (nodes.capacity[ends] < 1).any():
        at = int((nodes.capacity[ends] < 1).argmax())
        raise ValueError(
            f"append needs room in the node of every row, got none in node {ends[at]} of row {at}; give it "
            "capacity"
        )
    if np.unique(nodes.level[ends]).size > 1:
        raise ValueError(
            "append needs all rows to end in one level, got several; insert empty nodes, or pack all nodes "
            "in one PackedKV or PagedKV"
        )
    return [ends, nodes.slot[ends], nodes.capacity[ends]]


def _overwrite(old: tuple[Tensor | None, ...], new: tuple[Tensor | None, ...]) -> None:
    for there, value in zip(old, new, strict=True):
        if there is not None and value is not None and there is not value:
            there.copy_(value)

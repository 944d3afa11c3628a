"""What a plan keeps on its device at fixed addresses, where captured graphs find it at every replay."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydragen.backends.appends import Slots
from hydragen.backends.tokens import Tokens, find_tokens, planned_lens
from hydragen.backends.uploads import Uploaded
from hydragen.host_ints import IntArray
from hydragen.lengths import KVLens, node_index
from hydragen.slots import Growth, SlotTables
from hydragen.transforms import lasting_memory
from hydragen.validation.planned import Planned
from hydragen.validation.update import check_new_places, lengths_now
from hydragen.work import WorkPlan

# Launches of so many kinds of layers and options outlast a change of the tree.
_LAUNCHES_KEPT = 64


class PlanState:
    """Lengths, page numbers, positions and slots of a plan.

    Everything is computed on the device in the order of the stream, and overwritten in place.
    """

    def __init__(self, planned: Planned, work: WorkPlan, lens: KVLens, reserve: float) -> None:
        self.device = planned.like.device
        self.kv_lens: Tensor | None = None
        self.pages: Tensor | None = None
        self._before: Tensor | None = None
        self._grown = False
        self._reserved = reserve > 1
        self._captured = False  # an update: then replays let lengths grow, of which the host hears nothing
        self._tokens: dict[bool, Tokens] = {}
        self._slots = SlotTables(self.device)
        self._level_nodes: Tensor | None = None
        self._indices: dict[Any, Any] = {}
        with torch.inference_mode(False):  # what a plan owns outlives the mode in which it is made
            if planned.nodes.pages is not None:
                entries = planned.nodes.pages.indices
                self.pages = entries.new_zeros(math.ceil(reserve * max(entries.numel(), 1)))
                self.set_pages(entries)
            if planned.nodes.by_level and work.room is not None:
                self._level_nodes = torch.zeros(work.room[0], dtype=torch.int64, device=self.device)
                self._set_level_nodes(planned)
            self.set_lens(planned, work, lens)

    def set_lens(self, planned: Planned, work: WorkPlan, lens: KVLens, *, grown: bool = True) -> None:
        """Take over new lengths; if nodes have `grown`, what lies between old and new is to be written."""
        if not work.lens_on_device:
            return
        self._grown = grown and self.kv_lens is not None
        self._captured |= self._capturing()
        constant = planned_lens(work, self.device)
        if (lens.planned != work.kv_lens).any():
            given = constant.clone()
            given[: lens.planned.size].copy_(Uploaded([lens.planned], self.device).parts[0])
            constant = given
        clamped = lens.clamped(constant, partial(self._index, planned))
        if self.kv_lens is None or self._before is None:
            self.kv_lens, self._before = clamped, clamped.clone()
        else:
            # Not a bare copy: inductor (torch 2.13) does that last, when the source is overwritten already.
            self._before.copy_(self.kv_lens.clamp(min=0) if grown else clamped)
            self.kv_lens.copy_(clamped)
        self.refresh(planned, work)

    def check_places(self, planned: Planned, lens: KVLens | None, pages: Tensor | None) -> None:
        """Raise if new lengths or page numbers, with those of now in place of None, make writes overlap."""
        pages = self.pages if pages is None else pages
        if self.kv_lens is None or self._before is None or pages is None:
            return
        if lens is None:  # the tokens of the last update may still be written
            now = self.kv_lens.clamp(min=0)[: planned.tree.num_nodes].cpu().numpy().astype(np.int64)
            check_new_places(planned, self._before, now, pages)
        else:
            check_new_places(planned, self.kv_lens, lengths_now(lens), pages)

    def set_pages(self, indices: Tensor) -> None:
        """Take over other page numbers."""
        if self.pages is not None:
            self.pages[: indices.numel()].copy_(indices)

    def with_own_pages(self, planned: Planned) -> Planned:
        """Return `planned` with the plan's own page numbers: those of the caller may change at any time."""
        pages = planned.nodes.pages
        if pages is None or self.pages is None:
            return planned
        own = pages._replace(indices=self.pages[: pages.indices.numel()])
        return planned._replace(nodes=planned.nodes._replace(pages=own))

    def set_tree(self, planned: Planned) -> None:
        """Take over where nodes lie and rows end now; `set_lens` is next."""
        if self._level_nodes is not None:
            self._set_level_nodes(planned)
        self._slots.set_rows(planned)

    def refresh(self, planned: Planned, work: WorkPlan) -> None:
        """Compute what follows from lengths, pages and offsets anew, into the same memory."""
        for masked, old in self._tokens.items():
            _overwrite(old, self._find(planned, work, masked))
        if self.kv_lens is not None and self._before is not None:
            self._slots.refresh(planned, Growth(self._before, self.kv_lens, self.pages))

    def tokens(self, planned: Planned, work: WorkPlan, masked: bool) -> Tokens:
        """Return where query tokens and keys are."""
        found = self._tokens.get(masked)
        if found is None:
            with lasting_memory():
                found = self._tokens[masked] = self._find(planned, work, masked)
        return found

    def slots(self, planned: Planned) -> Slots | None:
        """Return where the newest tokens go; None if all rows have finished."""
        if self.kv_lens is None or self._before is None:
            raise ValueError(
                "append needs a plan whose lengths may grow, got one for fixed lengths; plan with kv_lens in "
                "tensors"
            )
        ends = planned.tree.row_to_node
        if self._reserved and not self._capturing() and not planned.nodes.capacity[ends].any():
            return None  # another tree may have rows that go on; a graph would write nothing ever after
        found = self._slots.find(planned, Growth(self._before, self.kv_lens, self.pages))
        if not (
            self._grown or self._captured
        ):  # nothing would be written, and what `run` then attends to is anything
            raise ValueError(
                "append needs an update of kv_lens without tree or kv since the plan was made or its tree "
                "last changed, got none; update with lengths that include the new tokens, and with tree and "
                "kv only where they change"
            )
        if self.device.type == "cpu" and ends.size:  # elsewhere nobody reads lengths back
            grown, q_len = (self.kv_lens - self._before).numpy()[ends], planned.q_shape[1]
            if grown.max() > q_len:
                row = int(grown.argmax())
                raise ValueError(
                    f"append needs rows that grew by at most the plan's q_len, {q_len}, in the last "
                    f"update, got row {row} grown by {grown[row]}; update once for tokens that are there "
                    "already, and once more for the new ones"
                )
        return found

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _find(self, planned: Planned, work: WorkPlan, masked: bool) -> Tokens:
        offsets, total = planned.rows.cu_seqlens_q, planned.q_shape[0]
        return find_tokens(work, self.kv_lens, offsets, total, masked, self.device)

    def _set_level_nodes(self, planned: Planned) -> None:
        """List the nodes level by level, where a captured update finds those of another tree."""
        order = np.concatenate([np.zeros(0, np.int64), *planned.tree.level_nodes])
        if self._level_nodes is not None and order.size:
            self._level_nodes[: order.size].copy_(Uploaded([order], self.device).parts[0])

    def _index(self, planned: Planned, nodes: IntArray) -> Tensor | slice:
        """Return where the lengths of `nodes`, all nodes or those of a level, are among all lengths."""
        if self._level_nodes is None:
            return node_index(nodes, self._indices, self.device)
        before = int((planned.tree.depth < planned.tree.depth[nodes[0]]).sum())
        return self._level_nodes[before : before + nodes.size]


def _overwrite(old: tuple[Tensor | None, ...], new: tuple[Tensor | None, ...]) -> None:
    for there, value in zip(old, new, strict=True):
        if there is not None and value is not None and there is not value:
            there.copy_(value)


def lasting(uploads: dict[Any, Any]) -> dict[Any, Any]:
    """Return what a plan keeps when its tree changes: its tables, and the launches that are not too old.

    Launches are made for the strides of keys and values; those of layouts long gone would pile up.
    """
    launches = [key for key in uploads if not isinstance(key[0], str)]
    old = set(launches[:-_LAUNCHES_KEPT])
    return {key: value for key, value in uploads.items() if key not in old}

"""Launching kernels that fetch keys and values by TMA: which calls they can serve, and tensor descriptors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydragen import prefix_tiles
from hydragen.backends.launch import Launcher, alignment
from hydragen.backends.tokens import Tokens
from hydragen.kv import NodeKV, Strides
from hydragen.layout import ITEM_COLUMNS, Launch
from hydragen.prefix_tiles import PrefixTile
from hydragen.queries import Heads
from hydragen.validation import Call
from hydragen.warp_tiles import WARP_TILES, WarpTile
from hydragen.work import WorkPlan

try:  # Gluon is an experimental part of Triton: where its names differ, the plain tile serves everything
    from hydragen.kernels.prefix_sm90 import BLOCK_LAYOUT, TensorDescriptor, attend_prefix
    from hydragen.kernels.warp_sm90 import attend_rows
except (ImportError, AttributeError) as error:  # pragma: no cover - the pinned Triton has it
    WHY_NOT: str | None = f"{type(error).__name__}: {error}"
    attend_prefix = attend_rows = None
else:
    WHY_NOT = None

__all__ = ["MOST_LEVELS", "WHY_NOT", "TmaLauncher", "attend_prefix", "attend_rows", "can_fetch", "levels_of"]

# Levels of KV that one launch can read: a tensor descriptor is an argument of the kernel.
MOST_LEVELS = 4


class TmaLauncher:
    """A launch of a specialised tile; `plain` steps in for addresses it cannot take.

    Descriptors are made on the host, at each call, since they hold the tensors' addresses: a captured graph
    keeps them as it keeps addresses.

    Parameters
    ----------
    launcher : Launcher
    plain : Launcher
        The same work on the plain tile.
    levels : tuple of int
        The levels of KV that it reads.
    boxes : (keys, elements of a row) that the kernel fetches at once, of k and of v
    strides : (strides of k, strides of v), of every level
    reserved : bool
        Other trees may follow, under a captured graph too: they may use more of the memory that the tensors
        lie in.
    tile : the tile that it launches
    """

    def __init__(
        self,
        launcher: Launcher,
        plain: Launcher,
        levels: tuple[int, ...],
        boxes: tuple[tuple[int, int], tuple[int, int]],
        strides: tuple[tuple[Strides, ...], tuple[Strides, ...]],
        reserved: bool,
        tile: PrefixTile | WarpTile,
    ) -> None:
        self.launcher = launcher
        self._reserved, self._prefix = reserved, isinstance(tile, PrefixTile)
        self._merges = isinstance(tile, WarpTile) and tile.merges
        self._plain, self._levels, self._boxes, self._strides = plain, levels, boxes, strides
        self._none = (None,) * (MOST_LEVELS - len(levels))
        self._fields: dict[tuple[int, int, torch.Size | int], dict[str, Any]] = {}

    def __call__(self, tensors: tuple[Any, ...], aligned: tuple[bool, ...]) -> bool:
        """Launch on the current stream, and return whether nothing is left to merge.

        `tensors` as `kernels.attend.attend` takes them, then the number of items in use, which may be empty,
        and which partials each token has.
        """
        q, ks, vs, out, lse, part_out, part_lse, sinks, items, _, *ints = tensors
        token, q_pos, kv_start, kv_lens, pages, count, merge_indptr, merge_indices = ints
        if self._reserved or not all(aligned):
            used = tuple([levels[level] for levels in (ks, vs) for level in self._levels])
            # nor can a tensor of no tokens be described, at which another tree may have none
            if not all(alignment(used)) or not all(x.numel() for x in used):
                self._plain(tensors[:-3], aligned)
                return False
        descriptors: list[Any] = [q]
        for side, levels in enumerate((ks, vs)):
            for level in self._levels:
                x = levels[level]
                room = 0
                if self._reserved:
                    room = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
                fields = self._fields.get((side, level, room or x.shape))
                fields = fields or self._describe(side, level, x, room)
                # Making one anew checks for microseconds what cannot have changed.
                described = object.__new__(TensorDescriptor)
                described.__dict__ = {**fields, "base": x}
                descriptors.append(described)
            descriptors += self._none
        if self._prefix:
            own = (q_pos, kv_start, kv_lens, pages)
        else:
            own = (kv_lens, pages, merge_indptr, merge_indices)
        results = (out, lse, part_out, part_lse, sinks)
        self.launcher((*descriptors, *results, items, count, token, *own), aligned)
        return self._merges

    def _describe(self, side: int, level: int, x: Tensor, room: int) -> dict[str, Any]:
        """Describe k (0) or v (1) of a level as [keys of all slots or pages, num_kv_heads * head_dim].

        `room`: elements from its first to the end of its memory, if all of them may be used; else 0.
        """
        slot, row, head, _ = self._strides[side][level]
        tokens = x.shape[-3]
        rows = tokens if x.dim() == 3 or x.shape[0] == 1 else (x.shape[0] - 1) * (slot // row) + tokens
        width = x.shape[-2] * head
        rows = (room - width) // row + 1 if room else rows
        shape, block = [rows, width], list(self._boxes[side])
        fields = dict(vars(TensorDescriptor(x, shape, [row, 1], block, BLOCK_LAYOUT)), base=None)
        self._fields[side, level, room or x.shape] = fields
        return fields


def can_fetch(plan: WorkPlan, call: Call, tokens: Tokens, launch: Launch, fold_scale: bool) -> bool:
    """Whether a specialised tile can do a launch of this call: rows of heads end to end, nothing masked.

    `fold_scale`: the scale may be multiplied with the largest logit instead of with all of them.
    """
    nodes, heads = call.nodes, plan.heads
    if WHY_NOT is not None or plan.target.arch != 90:
        return False
    if not fold_scale or call.q.stride(-1) != 1:
        return False
    if tokens.q_pos is not None and (launch.tile.prefix is None or call.options.window is not None):
        return False
    size = 0 if nodes.pages is None else nodes.pages.size
    if not prefix_tiles.reads_pages(size) or special_tile(launch, tokens, size) is None:
        return False
    levels = levels_of(launch, call)
    sides = ((nodes.k_strides, heads.head_dim), (nodes.v_strides, heads.head_dim_v))
    return len(levels) <= MOST_LEVELS and all(
        _describable(strides[level], size, heads, nodes, level, plan.reserved)
        for level in levels
        for strides, size in sides
    )


def special_tile(launch: Launch, tokens: Tokens, page_size: int) -> PrefixTile | WarpTile | None:
    """Return the specialised tile that serves a launch; None if pages of this size do not fit any.

    Boxes are of whole groups of 8 keys, as shared memory is laid out, and of one page each; the tile of one
    warp fetches a step at once.
    """
    prefix, warp = launch.tile.prefix, launch.tile.warp
    if prefix is not None and tokens.q_pos is not None:
        prefix = prefix_tiles.tile_for_causal(prefix)
    if page_size == 0:
        return prefix or warp
    if prefix is not None:
        fits = page_size % 8 == 0 and (page_size % prefix.block_n == 0 or prefix.block_n % page_size == 0)
        return prefix if fits else None
    if warp is None:
        return None
    smaller = replace(WARP_TILES["medium"], merges=warp.merges)
    return next((tile for tile in (warp, smaller) if page_size % tile.block_n == 0), None)


def box(tile: PrefixTile | WarpTile, head_dim: int, page_size: int, step: int) -> tuple[int, int]:
    """Return the keys and elements of a row that a kernel fetches at once; `page_size` 0: no pages.

    Not more keys than the `step` that splits are multiples of: a box lies within a page.
    """
    if page_size == 0 or isinstance(tile, WarpTile):
        return tile.block_n, head_dim
    return min(tile.block_n, page_size, step), 64


def levels_of(launch: Launch, call: Call) -> tuple[int, ...]:
    """Return the levels of KV that a launch reads, rising: all, if other trees may follow."""
    if launch.num_items.size:
        return tuple(range(len(call.nodes.k)))
    return tuple(np.unique(launch.items[:, ITEM_COLUMNS.index("level")]).tolist())


def _describable(
    strides: Strides, size: int, heads: Heads, nodes: NodeKV, level: int, reserved: bool
) -> bool:
    slot, row, head, dim = strides
    # other trees may have several where this one has one
    one_slot = not reserved and not nodes.packed[level] and nodes.k[level].shape[0] == 1
    even = row % 8 == 0 and row >= heads.num_kv_heads * size  # steps of 16 bytes
    return size in (64, 128, 256) and head == size and dim == 1 and even and (one_slot or slot % row == 0)

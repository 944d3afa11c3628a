"""Launching the specialised tile of kernels/prefix_sm90.py: what it can serve, and its tensor descriptors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydragen.backends.launch import LOG2_E, Launcher, alignment
from hydragen.backends.tokens import Tokens
from hydragen.kv import NodeKV, Strides
from hydragen.layout import ITEM_COLUMNS, Launch
from hydragen.prefix_tiles import PrefixTile
from hydragen.queries import Heads
from hydragen.validation import Call
from hydragen.work import WorkPlan

try:  # Gluon is an experimental part of Triton: where its names differ, the plain tile serves everything
    from hydragen.kernels.prefix_sm90 import BLOCK_LAYOUT, TensorDescriptor, attend_prefix
except (ImportError, AttributeError) as error:  # pragma: no cover - the pinned Triton has it
    WHY_NOT: str | None = f"{type(error).__name__}: {error}"
else:
    WHY_NOT = None

# Levels of KV that one launch can read: a tensor descriptor is an argument of the kernel.
MOST_LEVELS = 4


class PrefixLauncher:
    """A launch of the specialised tile; `plain` steps in for addresses it cannot take.

    Descriptors are made on the host, at each call, since they hold the tensors' addresses: a captured graph
    keeps them as it keeps addresses.
    """

    def __init__(
        self,
        launcher: Launcher,
        plain: Launcher,
        levels: tuple[int, ...],
        tile: PrefixTile,
        strides: tuple[tuple[Strides, ...], tuple[Strides, ...]],
    ) -> None:
        self._launcher, self._plain, self._levels = launcher, plain, levels
        self._tile, self._strides = tile, strides
        self._none = (None,) * (MOST_LEVELS - len(levels))
        self._fields: dict[tuple[int, int, torch.Size], dict[str, Any]] = {}

    def __call__(self, tensors: tuple[Any, ...], aligned: tuple[bool, ...]) -> None:
        """Launch on the current stream; `tensors` as `kernels.attend.attend` takes them."""
        q, ks, vs, out, lse, part_out, part_lse, sinks, items, _, token, _, _, kv_lens, _ = tensors
        if not all(aligned):
            used = [x for levels in (ks, vs) for x in (levels[level] for level in self._levels)]
            if not all(alignment(tuple(used))):
                self._plain(tensors, aligned)
                return
        descriptors: list[Any] = [q]
        for side, levels in enumerate((ks, vs)):
            for level in self._levels:
                x = levels[level]
                fields = self._fields.get((side, level, x.shape)) or self._describe(side, level, x)
                # Making one anew checks for microseconds what cannot have changed.
                described = object.__new__(TensorDescriptor)
                described.__dict__ = {**fields, "base": x}
                descriptors.append(described)
            descriptors += self._none
        self._launcher((*descriptors, out, lse, part_out, part_lse, sinks, items, token, kv_lens), aligned)

    def _describe(self, side: int, level: int, x: Tensor) -> dict[str, Any]:
        """Describe k (0) or v (1) of a level as [keys of all slots, num_kv_heads * head_dim]."""
        slot, row, head, _ = self._strides[side][level]
        tokens = x.shape[-3]
        rows = tokens if x.dim() == 3 or x.shape[0] == 1 else (x.shape[0] - 1) * (slot // row) + tokens
        shape, block = [rows, x.shape[-2] * head], [self._tile.block_n, head]
        fields = dict(vars(TensorDescriptor(x, shape, [row, 1], block, BLOCK_LAYOUT)), base=None)
        self._fields[side, level, x.shape] = fields
        return fields


def serves(plan: WorkPlan, call: Call, tokens: Tokens, launch: Launch, fold_scale: bool) -> bool:
    """Whether the specialised tile can do a launch of this call: rows of heads end to end, nothing masked.

    `fold_scale`: the scale may be multiplied with the largest logit instead of with all of them.
    """
    nodes, heads = call.nodes, plan.heads
    if launch.tile.prefix is None or WHY_NOT is not None or plan.target.arch != 90:
        return False
    if not fold_scale or tokens.q_pos is not None:
        return False
    if nodes.pages is not None or call.q.stride(-1) != 1:
        return False
    levels = levels_of(launch)
    sides = ((nodes.k_strides, heads.head_dim), (nodes.v_strides, heads.head_dim_v))
    return len(levels) <= MOST_LEVELS and all(
        _describable(strides[level], size, heads, nodes, level) for level in levels for strides, size in sides
    )


def levels_of(launch: Launch) -> tuple[int, ...]:
    """Return the levels of KV that a launch reads, rising."""
    return tuple(np.unique(launch.items[:, ITEM_COLUMNS.index("level")]).tolist())


def _describable(strides: Strides, size: int, heads: Heads, nodes: NodeKV, level: int) -> bool:
    slot, row, head, dim = strides
    one_slot = not nodes.packed[level] and nodes.k[level].shape[0] == 1
    even = row % 8 == 0 and row >= heads.num_kv_heads * size  # steps of 16 bytes
    return size in (64, 128, 256) and head == size and dim == 1 and even and (one_slot or slot % row == 0)


def prefix_launcher(
    plan: WorkPlan,
    call: Call,
    tokens: Tokens,
    launch: Launch,
    plain: Launcher,
    pdl: bool,
    waits: bool,
    kinds: Any,
) -> PrefixLauncher:
    """Return the launch of the specialised tile.

    Parameters
    ----------
    plan, call, tokens, launch
        As `serves` has approved them.
    plain : Launcher
        The same work on the plain tile.
    pdl, waits : bool
        Whether launches overlap, and whether this one follows another of the same call.
    kinds : what else decides the compiled code
    """
    tile = launch.tile.prefix
    if tile is None or WHY_NOT is not None:
        raise ImportError(f"this Triton has no Gluon as kernels/prefix_sm90.py needs it: {WHY_NOT}")
    q, heads, options, final = call.q, plan.heads, call.options, plan.work.final
    levels, k_strides, v_strides = levels_of(launch), call.nodes.k_strides, call.nodes.v_strides
    num_tasks = launch.items.shape[0] * heads.num_kv_heads
    numbers = (
        num_tasks,
        launch.items.shape[0],
        q.shape[1] if q.dim() == 4 else 1,
        levels,
        tuple([k_strides[level][0] // k_strides[level][1] for level in levels]),
        tuple([v_strides[level][0] // v_strides[level][1] for level in levels]),
        options.scale * LOG2_E,
        q.stride(0),
        q.stride(1) if q.dim() == 4 else 0,
        q.stride(-2),
    )
    constants = (
        heads.group_size,
        heads.num_kv_heads,
        heads.head_dim,
        heads.head_dim_v,
        tile.block_n,
        tile.num_stages,
        tile.consumers,
        tile.consumer_registers,
        tile.q_shared,
        tokens.token is not None,  # GATHER_Q
        tokens.kv_lens is not None,  # HAS_LENS
        final,  # FINAL
        options.sinks is not None and final,  # HAS_SINKS
        options.return_lse,  # HAS_LSE
        pdl,  # PDL
        len(levels),  # NUM_LEVELS
    )
    launcher = Launcher(
        attend_prefix,
        (tile.num_programs(num_tasks, plan.target.num_sms), 1, 1),
        numbers,
        constants,
        {"num_warps": 4, "maxnreg": tile.registers, "launch_pdl": pdl and waits},
        kinds,
    )
    return PrefixLauncher(launcher, plain, levels, tile, (k_strides, v_strides))

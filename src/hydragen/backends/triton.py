"""The Triton path: one launch per kind of tile over one work table, then one merge of partials."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydragen.backends.append_launch import append
from hydragen.backends.launch import INTERPRET, LOG2_E, Launcher, alignment
from hydragen.backends.launches import attend_launcher, merge_launcher
from hydragen.backends.tma import TmaLauncher
from hydragen.backends.tokens import Tokens, locate
from hydragen.backends.uploads import Uploaded
from hydragen.transforms import check_untransformed
from hydragen.types import AttentionState
from hydragen.validation import Call
from hydragen.work import WorkPlan

__all__ = ["RUNS_TILES", "Ready", "append", "prepare", "ready", "replace_tables", "run"]

RUNS_TILES = True
# Kinds of calls that a plan remembers the launches of.
_MOST_LAUNCHES = 256


class _Workspace(NamedTuple):
    """Memory for partial results.

    Attributes
    ----------
    part_out : float32 [num_partials, num_q_heads, head_dim_v]
    part_lse : float32 [num_partials, num_q_heads]
    """

    part_out: Tensor
    part_lse: Tensor


class _Tables(NamedTuple):
    """A plan's tables on a device: items, links and the number of items of each launch, every token's
    partials; and an lse of no elements.
    """

    items: tuple[tuple[Tensor, Tensor, Tensor], ...]
    merge_indptr: Tensor
    merge_indices: Tensor
    no_lse: Tensor


class Ready:
    """Calls of one kind, checked and laid out: what is left is to allocate the results and to launch.

    Holds nothing of the call that it was made for but what the plan owns.
    """

    def __init__(self, plan: WorkPlan, call: Call, tokens: Tokens) -> None:
        q, options, pages = call.q, call.options, call.nodes.pages
        self._plan = plan
        self._out_dtype, self._return_lse = options.out_dtype, options.return_lse
        self._out_shape, self._lse_shape = (*q.shape[:-1], plan.heads.head_dim_v), q.shape[:-1]
        # an allocation that has nothing to look up takes half the time
        self._like_q = q.is_contiguous() and (self._out_shape, self._out_dtype) == (q.shape, q.dtype)
        self._empty = q.numel() == 0
        self._gpu = q.device.index if q.device.type == "cuda" else None
        attends, self._merges = _launchers(plan, call, tokens)
        tables = _tables(plan, q.device)
        self._workspace: _Workspace | None = plan.uploads.get(("workspace", q.device))
        self._no_lse = tables.no_lse
        any_ints = tables.merge_indptr  # stands for pointers that this call does not use
        token = any_ints if tokens.token is None else tokens.token
        ints = (
            token,
            any_ints if tokens.q_pos is None else tokens.q_pos,
            any_ints if tokens.kv_start is None else tokens.kv_start,
            any_ints if tokens.kv_lens is None else tokens.kv_lens,
            any_ints if pages is None else pages.indices,
        )
        self._attends = []
        merge = (tables.merge_indptr, tables.merge_indices)
        for launch, (items, links, num_items) in zip(attends, tables.items, strict=True):
            more = (num_items, *merge) if isinstance(launch, TmaLauncher) else ()
            self._attends.append((launch, (items, links, *ints, *more)))
        self._merge_ints = (tables.merge_indptr, tables.merge_indices, token)
        self._ints_aligned = alignment((tokens.kv_lens, ints[-1]))

    def __call__(
        self, q: Tensor, k: tuple[Tensor, ...], v: tuple[Tensor, ...], sinks: Tensor | None
    ) -> AttentionState:
        """Compute one call with these tensors."""
        out = torch.empty_like(q) if self._like_q else q.new_empty(self._out_shape, dtype=self._out_dtype)
        lse = q.new_empty(self._lse_shape, dtype=torch.float32) if self._return_lse else self._no_lse
        if self._empty:
            return AttentionState(out, lse)
        if self._gpu is None or self._gpu == torch.cuda.current_device():
            self._launch(q, k, v, out, lse, sinks)
        else:
            with torch.cuda.device(self._gpu):
                self._launch(q, k, v, out, lse, sinks)
        return AttentionState(out, lse)

    def _launch(
        self,
        q: Tensor,
        k: tuple[Tensor, ...],
        v: tuple[Tensor, ...],
        out: Tensor,
        lse: Tensor,
        sinks: Tensor | None,
    ) -> None:
        part_out, part_lse = self._workspace or _workspace(self._plan, q.device)
        sinks = None if sinks is None else sinks.contiguous()  # the kernels take no stride for them
        some_sinks = part_lse if sinks is None else sinks
        aligned = alignment((q, *k, *v, sinks))
        buffers = (q, k, v, out, lse, part_out, part_lse, some_sinks)
        merged = False
        for launch, ints in self._attends:
            merged = launch(buffers + ints, aligned + self._ints_aligned)
        if self._merges is not None and not merged:
            self._merges((part_out, part_lse, out, lse, some_sinks, *self._merge_ints), aligned[-1:])


def run(plan: WorkPlan, call: Call, tokens: Tokens | None = None) -> AttentionState:
    """Compute one planned call.

    Parameters
    ----------
    plan, call
    tokens : Tokens, optional
        What `locate` returns, if it is known already.

    Returns
    -------
    AttentionState
        `out` like q with head_dim_v, in the dtype that is asked for; `lse` float32, or empty unless it is
        asked for.
    """
    _check_supported(call)
    tokens = locate(plan, call, kernels_clamp=True) if tokens is None else tokens
    return Ready(plan, call, tokens)(call.q, call.nodes.k, call.nodes.v, call.options.sinks)


def ready(plan: WorkPlan, call: Call, tokens: Tokens) -> Ready:
    """Return what computes calls that differ from this one in nothing but what their tensors hold."""
    _check_supported(call)
    return Ready(plan, call, tokens)


def prepare(plan: WorkPlan, device: torch.device) -> None:
    """Upload the plan's tables and give it memory of its own for partial results: runs must not overlap."""
    _tables(plan, device)
    plan.uploads["workspace", device] = _workspace(plan, device)


def replace_tables(plan: WorkPlan, device: torch.device) -> None:
    """Overwrite, on `device`, the tables of the plan before, whose `uploads` this one has."""
    uploaded: Uploaded = plan.uploads["tables", device][0]
    uploaded.replace(_table_arrays(plan))


def _workspace(plan: WorkPlan, device: torch.device) -> _Workspace:
    rows, heads = plan.work.num_partials, plan.heads
    shape = (rows, heads.num_q_heads, heads.head_dim_v)
    part_out = torch.empty(shape, dtype=torch.float32, device=device)
    return _Workspace(part_out, torch.empty(shape[:-1], dtype=torch.float32, device=device))


def _tables(plan: WorkPlan, device: torch.device) -> _Tables:
    """Return a plan's tables on `device`, uploaded in one copy the first time."""
    found: tuple[Uploaded, _Tables] | None = plan.uploads.get(("tables", device))
    if found is None:
        uploaded = Uploaded(_table_arrays(plan), device)
        *parts, indptr, indices = uploaded.parts
        items = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
        no_lse = torch.empty(0, dtype=torch.float32, device=device)
        found = plan.uploads["tables", device] = (uploaded, _Tables(tuple(items), indptr, indices, no_lse))
    return found[1]


def _table_arrays(plan: WorkPlan) -> list[NDArray[np.int32]]:
    work = plan.work
    tables = ((launch.items, launch.links, launch.num_items) for launch in work.launches)
    return [*(table for three in tables for table in three), work.merge_indptr, work.merge_indices]


def _launchers(
    plan: WorkPlan, call: Call, tokens: Tokens
) -> tuple[tuple[Launcher | TmaLauncher, ...], Launcher | None]:
    """Return the launches of calls like this one, made the first time."""
    q, nodes, options, pages = call.q, call.nodes, call.options, call.nodes.pages
    key: tuple[Any, ...] = (
        q.dtype,
        q.device,
        q.shape[1] if q.dim() == 4 else 0,
        q.stride(),
        nodes.k_strides,
        nodes.v_strides,
        None if pages is None else pages[1:],
        options.key,
        tokens.token is None,
        tokens.q_pos is None,
        tokens.kv_lens is None,
    )
    found: tuple[tuple[Launcher | TmaLauncher, ...], Launcher | None] | None = plan.uploads.get(key)
    if found is None:
        launches = range(len(plan.work.launches))
        attends = tuple(attend_launcher(plan, call, tokens, index) for index in launches)
        merges = None if plan.work.final else merge_launcher(plan, call, tokens)
        if len(plan.uploads) > _MOST_LAUNCHES:  # scales or layouts that never come again must not pile up
            for old in [key for key in plan.uploads if not isinstance(key[0], str)]:
                del plan.uploads[old]
        found = plan.uploads[key] = (attends, merges)
    return found


def _check_supported(call: Call) -> None:
    q, options = call.q, call.options
    if q.device.type != "cuda" and not INTERPRET:
        raise ValueError(
            f'backend "triton" needs CUDA tensors, got q on {q.device}; pass backend="reference", or set '
            "TRITON_INTERPRET=1 before triton is imported to run the kernels in Triton's interpreter"
        )
    if q.dtype == torch.float64:
        raise TypeError(
            'backend "triton" takes float16, bfloat16 and float32, got torch.float64; '
            'pass backend="reference"'
        )
    if torch.is_grad_enabled():
        tensors = [q, *call.nodes.k, *call.nodes.v, *([] if options.sinks is None else [options.sinks])]
        if any(x.requires_grad for x in tensors):
            raise ValueError(
                'backend "triton" computes no gradients yet, but an input has requires_grad=True; '
                'pass backend="reference", or call under torch.no_grad()'
            )
    pages = call.nodes.pages
    check_untransformed(
        'backend "triton"',
        'pass backend="reference"',
        [
            ("q", q),
            *((f"k of kv[{i}]", k) for i, k in enumerate(call.nodes.k)),
            *((f"v of kv[{i}]", v) for i, v in enumerate(call.nodes.v)),
            ("sinks", options.sinks),
            ("cu_seqlens_q", call.cu_seqlens_q),
            ("page_indices", None if pages is None else pages.indices),
            *(("kv_lens", lens) for _, lens in call.kv_lens.on_device),
        ],
    )
    if not math.isfinite(options.scale * LOG2_E):
        raise ValueError(f"scale must be finite in base 2, got {options.scale}; choose a smaller one")

"""Query tokens and positions on q's device: constants of a plan, or computed from lengths that live there."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hydragen.forest import path_sums
from hydragen.host_ints import IntArray
from hydragen.validation import Call
from hydragen.work import WorkPlan


class Tokens(NamedTuple):
    """Where the query tokens are, in tree order.

    Attributes
    ----------
    token : int32 [num_tokens] or None
        Index into q flattened over tokens, -1 where a row of capacity is not filled; None: 0, 1, 2, ...
    q_pos : int32 [num_tokens] or None
        Absolute positions; None if nothing is masked by position.
    kv_start : int32 [num_nodes] or None
        Absolute position of each node's first key; None likewise.
    kv_lens : int32 [num_nodes] or None
        Lengths on the device, clamped to the capacities; None if the plan knows them.
    """

    token: Tensor | None
    q_pos: Tensor | None
    kv_start: Tensor | None
    kv_lens: Tensor | None


def locate(plan: WorkPlan, call: Call, *, kernels_clamp: bool = False) -> Tokens:
    """Return the tensors that this call needs; nothing waits for the device.

    With `kernels_clamp` lengths may be left as they were given, to be clamped where they are read.
    """
    masked = needs_positions(plan, call)
    constants = _constants(plan, call.q.device)
    kv_lens = None
    if plan.lens_on_device:
        given = None if masked or not kernels_clamp else call.kv_lens.unclamped(constants.planned_lens)
        kv_lens = call.kv_lens.clamped(constants.planned_lens, plan.uploads) if given is None else given
    if call.cu_seqlens_q is None and (kv_lens is None or not masked):
        pos, start = _host_positions(plan, call.q.device) if masked else (None, None)
        return Tokens(constants.token, pos, start, kv_lens)
    token, q_lens = constants.token, constants.q_lens
    if call.cu_seqlens_q is not None:
        # clamped, as lengths are: offsets that are wrong must not become addresses outside of q and out
        offsets = call.cu_seqlens_q.clamp(0, call.q.shape[0]).to(torch.int32)
        q_lens = offsets.diff()
        filled = constants.within < q_lens[constants.row]
        token = torch.where(filled, offsets[:-1][constants.row] + constants.within, -1)
    if not masked:
        return Tokens(token, None, None, kv_lens)
    lens = constants.planned_lens if kv_lens is None else kv_lens
    # sums over each node's ancestors: integers, so the order in which they are added does not matter
    path_len = lens.index_add(0, constants.descendant, lens[constants.ancestor])
    q_pos = path_len[constants.row_to_node][constants.row] - q_lens[constants.row] + constants.within
    return Tokens(token, q_pos.to(torch.int32), path_len - lens, kv_lens)


def needs_positions(plan: WorkPlan, call: Call) -> bool:
    """Whether any key can be hidden from a query by its position."""
    if call.options.window is not None:
        return True
    # The only query of a row is the last position of its path: causality hides nothing from it. Whether other
    # rows have more must not choose another kernel under batch_invariant.
    return call.options.causal and (plan.batch_invariant or int(call.q_lens.max(initial=0)) > 1)


class _Constants(NamedTuple):
    token: Tensor | None
    row: Tensor
    within: Tensor
    q_lens: Tensor
    row_to_node: Tensor
    planned_lens: Tensor
    descendant: Tensor
    ancestor: Tensor


def _constants(plan: WorkPlan, device: torch.device) -> _Constants:
    found = plan.uploads.get(("constants", device))
    if found is None:
        found = plan.uploads["constants", device] = _upload_constants(plan, device)
    return found


def _upload_constants(plan: WorkPlan, device: torch.device) -> _Constants:
    queries = plan.queries
    descendant, ancestor = _ancestor_pairs(plan.tree.parents)

    def there(array: IntArray) -> Tensor:
        return torch.from_numpy(array.astype(np.int32)).to(device, non_blocking=True)

    return _Constants(
        None if queries.in_order else there(queries.token),
        there(queries.row),
        there(queries.within),
        there(queries.q_lens),
        there(plan.tree.row_to_node),
        there(plan.kv_lens),
        there(descendant),
        there(ancestor),
    )


def _host_positions(plan: WorkPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    found = plan.uploads.get(("positions", device))
    if found is None:
        found = plan.uploads["positions", device] = _upload_positions(plan, device)
    return found


def _upload_positions(plan: WorkPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    path_len = path_sums(plan.tree.parents, plan.kv_lens)
    queries = plan.queries
    row_path = path_len[plan.tree.row_to_node]
    q_pos = row_path[queries.row] - queries.q_lens[queries.row] + queries.within
    tensors = [torch.from_numpy(x.astype(np.int32)).to(device) for x in (q_pos, path_len - plan.kv_lens)]
    return tensors[0], tensors[1]


def _ancestor_pairs(parents: IntArray) -> tuple[IntArray, IntArray]:
    """Return every (node, ancestor) pair, as two arrays."""
    nodes, above = np.arange(parents.size), parents
    descendants, ancestors = [], []
    while (keep := above >= 0).any():
        nodes, above = nodes[keep], above[keep]
        descendants.append(nodes)
        ancestors.append(above)
        above = parents[above]
    empty = [parents[:0]]
    return np.concatenate(descendants or empty), np.concatenate(ancestors or empty)

"""Query tokens and positions on q's device: constants of a plan, or computed from lengths that live there."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hydragen.backends.uploads import Uploaded
from hydragen.forest import path_sums
from hydragen.host_ints import IntArray
from hydragen.lengths import node_index
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
    """Return the tensors that a call needs; nothing waits for the device.

    With `kernels_clamp` lengths may be left as they were given, to be clamped where they are read.
    """
    device = call.q.device
    masked = needs_positions(plan, call)
    lens = None
    if plan.lens_on_device:
        planned = _constants(plan, device).planned_lens
        given = None if masked or not kernels_clamp else call.kv_lens.unclamped(planned)
        index_of = partial(node_index, uploads=plan.uploads, device=device)
        lens = call.kv_lens.clamped(planned, index_of) if given is None else given
    return find_tokens(plan, lens, call.cu_seqlens_q, call.q.shape[0], masked, device)


def find_tokens(
    plan: WorkPlan,
    kv_lens: Tensor | None,
    cu_seqlens_q: Tensor | None,
    total_q: int,
    masked: bool,
    device: torch.device,
) -> Tokens:
    """Return where tokens and keys are.

    Parameters
    ----------
    plan : WorkPlan
    kv_lens : int32 [num_nodes] or None
        Lengths on the device; clamped if `masked`. None: the plan knows them.
    cu_seqlens_q : integers [num_rows + 1] or None
        Offsets of the rows in packed q, on the device; None: the plan knows them.
    total_q : int
        Tokens in packed q.
    masked : bool
        Whether positions are needed.
    device : torch.device
    """
    constants = _constants(plan, device)
    if cu_seqlens_q is None and (kv_lens is None or not masked):
        pos, start = _host_positions(plan, device) if masked else (None, None)
        return Tokens(constants.token, pos, start, kv_lens)
    token, q_lens = constants.token, constants.q_lens
    if cu_seqlens_q is not None:
        # clamped, as lengths are: offsets that are wrong must not become addresses outside of q and out
        offsets = cu_seqlens_q.clamp(0, total_q).to(torch.int32)
        q_lens = offsets.diff()
        filled = constants.within < q_lens[constants.row]
        token = torch.where(filled, offsets[:-1][constants.row] + constants.within, -1)
    if not masked:
        return Tokens(token, None, None, kv_lens)
    lens = constants.planned_lens if kv_lens is None else kv_lens
    # sums over each node's ancestors: integers, so the order in which they are added does not matter
    descendant, ancestor = _pairs(plan, device).parts
    path_len = lens.index_add(0, descendant, lens[ancestor])
    q_pos = path_len[constants.row_to_node][constants.row] - q_lens[constants.row] + constants.within
    return Tokens(token, q_pos.to(torch.int32), path_len - lens, kv_lens)


def needs_positions(plan: WorkPlan, call: Call) -> bool:
    """Whether any key can be hidden from a query by its position."""
    if call.options.window is not None:
        return True
    # The only query of a row is the last position of its path: causality hides nothing from it. Whether other
    # rows have more must not choose another kernel under batch_invariant.
    return call.options.causal and (plan.batch_invariant or int(call.q_lens.max(initial=0)) > 1)


def planned_lens(plan: WorkPlan, device: torch.device) -> Tensor:
    """Return the plan's lengths and capacities on `device`, int32 [num_nodes, or room for them and one]."""
    return _constants(plan, device).planned_lens


def replace_constants(plan: WorkPlan, device: torch.device) -> None:
    """Overwrite, on `device`, what was uploaded for the plan before, whose `uploads` this one has."""
    uploaded: Uploaded = plan.uploads["constants", device][0]
    uploaded.replace(_constant_arrays(plan))
    pairs: Uploaded | None = plan.uploads.get(("pairs", device))
    if pairs is not None:
        pairs.replace(_pair_arrays(plan))


class _Constants(NamedTuple):
    """Of a plan with room there is one node more than room for, of length 0: padding refers to it."""

    token: Tensor | None
    row: Tensor
    within: Tensor
    q_lens: Tensor
    row_to_node: Tensor
    planned_lens: Tensor


def _constants(plan: WorkPlan, device: torch.device) -> _Constants:
    found: tuple[Uploaded, _Constants] | None = plan.uploads.get(("constants", device))
    if found is None:
        uploaded = Uploaded(_constant_arrays(plan), device)
        token, *others = uploaded.parts
        in_order = plan.queries.in_order and plan.room is None
        found = uploaded, _Constants(None if in_order else token, *others)
        plan.uploads["constants", device] = found
    return found[1]


def _constant_arrays(plan: WorkPlan) -> list[IntArray]:
    queries, kv_lens = plan.queries, plan.kv_lens
    if plan.room is not None:
        kv_lens = np.pad(kv_lens, (0, plan.room[0] + 1 - kv_lens.size))
    return [queries.token, queries.row, queries.within, queries.q_lens, plan.tree.row_to_node, kv_lens]


def _pairs(plan: WorkPlan, device: torch.device) -> Uploaded:
    """Return every pair of a node and one of its ancestors; of a deep tree there are many."""
    found: Uploaded | None = plan.uploads.get(("pairs", device))
    if found is None:
        found = plan.uploads["pairs", device] = Uploaded(_pair_arrays(plan), device)
    return found


def _pair_arrays(plan: WorkPlan) -> list[IntArray]:
    pairs = _ancestor_pairs(plan.tree.parents)
    if plan.room is None:
        return list(pairs)
    nodes, room = plan.room
    return [np.pad(x, (0, room - x.size), constant_values=nodes) for x in pairs]


def _host_positions(plan: WorkPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    found: Uploaded | None = plan.uploads.get(("positions", device))
    if found is None:
        path_len = path_sums(plan.tree.parents, plan.kv_lens)
        queries = plan.queries
        row_path = path_len[plan.tree.row_to_node]
        q_pos = row_path[queries.row] - queries.q_lens[queries.row] + queries.within
        found = plan.uploads["positions", device] = Uploaded([q_pos, path_len - plan.kv_lens], device)
    return found.parts[0], found.parts[1]


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

"""The reference path: the paper's algorithm in plain PyTorch, on blocks of like segments."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hydragen.backends.appends import write as append
from hydragen.backends.tokens import Tokens, locate
from hydragen.host_ints import IntArray
from hydragen.kv import NodeKV, node_kv_of_packed
from hydragen.runs import Runs, find_runs
from hydragen.types import AttentionState
from hydragen.validation import Call
from hydragen.work import WorkPlan
from hydragen_reference import decomposed

__all__ = ["RUNS_TILES", "append", "prepare", "ready", "replace_tables", "run"]

RUNS_TILES = False
# Shorter segments of a packed tensor are copied side by side and attended together; longer ones one by one.
_COPY_UP_TO = 512


def ready(plan: WorkPlan, call: Call, tokens: Tokens) -> None:
    """Nothing is laid out before a call."""


def run(plan: WorkPlan, call: Call, tokens: Tokens | None = None) -> AttentionState:
    """Compute one planned call; gradients flow through `out` and `lse`.

    Parameters
    ----------
    plan, call
    tokens : Tokens, optional
        What `locate` returns, if it is known already.

    Returns
    -------
    AttentionState
        `out` like q with head_dim_v, in the dtype that is asked for; `lse` float32 (float64 for float64).
    """
    q, options = call.q, call.options
    tokens = locate(plan, call) if tokens is None else tokens
    call = call._replace(nodes=_gathered(call.nodes))
    flat = q.reshape(-1, *q.shape[-2:])
    q_pos = None
    if tokens.q_pos is not None:
        q_pos = _to_caller_order(tokens.q_pos, tokens.token, flat.shape[0])
    blocks = list((_blocks_of_one_row if plan.batch_invariant else _blocks)(plan, call, tokens))
    nothing = not blocks  # then no segments, which still tell the size of values
    if nothing:
        empty = (x.new_empty(0, 0, *x.shape[-2:]) for x in (call.nodes.k[0], call.nodes.v[0]))
        blocks = [decomposed.Block(*empty)]
    state = decomposed.tree_attention(
        flat,
        blocks,
        q_pos=q_pos,
        scale=options.scale,
        causal=options.causal and q_pos is not None,
        window=options.window,
        softcap=options.softcap,
        sinks=options.sinks,
        out_dtype=options.out_dtype,
    )
    shape = q.shape[:-1]
    out, lse = state.out.reshape(*shape, plan.heads.head_dim_v), state.lse.reshape(shape)
    if nothing:  # a function of its inputs all the same, with gradients of 0
        inputs = (q, *call.nodes.k, *call.nodes.v)
        out = out + sum(x.flatten()[:0].sum().to(out.dtype) for x in inputs)
    return AttentionState(out, lse)


def prepare(plan: WorkPlan, device: torch.device) -> None:
    """Nothing: there are no tables."""


def replace_tables(plan: WorkPlan, device: torch.device) -> None:
    """Nothing: there are no tables."""


def _gathered(nodes: NodeKV) -> NodeKV:
    """Copy the pages of all nodes side by side, as one packed tensor; other layouts stay as they are."""
    if nodes.pages is None:
        return nodes
    pages = nodes.pages
    indices = pages.indices.long().clamp(0, max(pages.num_pages - 1, 0))
    k, v = (x[0][indices].flatten(0, 1) for x in (nodes.k, nodes.v))
    return node_kv_of_packed(k, v, np.append(nodes.slot, indices.numel()) * pages.size)


def _to_caller_order(values: Tensor, token: Tensor | None, size: int) -> Tensor:
    if token is None:
        return values
    # one place more, for the -1 of unfilled rows
    result = values.new_zeros(size + 1)
    return result.index_copy(0, torch.where(token < 0, size, token).long(), values)[:size]


def _blocks(plan: WorkPlan, call: Call, tokens: Tokens) -> Iterator[decomposed.Block]:
    """Yield the segments grouped into blocks: one depth, equal query counts, keys of like length."""
    segments = find_runs(plan.tree, plan.kv_lens, plan.queries, None, 1)
    nodes = call.nodes
    node, num_tok = segments.node, segments.num_tok
    # lengths within a factor of two of one another share a block; a padded level has one capacity anyway
    packed = np.array(nodes.packed, bool)[nodes.level[node]]
    bucket = np.where(packed, np.ceil(np.log2(segments.kv_len)), 0).astype(np.int64)
    alone = np.where(packed & (segments.kv_len > _COPY_UP_TO), node + 1, 0)
    # one depth each: a node and its parent may have the same tokens, and a block takes a token once
    keys = np.stack([plan.tree.depth[node], num_tok, bucket, alone], axis=1)
    _, group = np.unique(keys, axis=0, return_inverse=True)
    group = group.reshape(-1)
    for index in range(int(group.max(initial=-1)) + 1):
        yield _block(plan, call, tokens, segments, np.flatnonzero(group == index))


def _block(plan: WorkPlan, call: Call, tokens: Tokens, segments: Runs, chosen: IntArray) -> decomposed.Block:
    nodes, device = call.nodes, call.q.device
    node = segments.node[chosen]
    level, slots = int(nodes.level[node[0]]), nodes.slot[node]
    k, v = nodes.k[level], nodes.v[level]
    lens = segments.kv_len[chosen]
    longest = int(lens.max())
    packed = nodes.packed[level]
    if packed and node.size == 1:
        k, v = (x[slots[0] : slots[0] + longest].unsqueeze(0) for x in (k, v))
    elif packed:
        # past a segment's end its last key again, which kv_lens hides
        where = slots[:, None] + np.minimum(np.arange(longest), lens[:, None] - 1)
        index = torch.from_numpy(where).to(device)
        k, v = k[index], v[index]
    else:
        if not np.array_equal(slots, np.arange(k.shape[0])):
            step = slots[1] - slots[0] if slots.size > 1 else 1
            if step > 0 and np.array_equal(slots, np.arange(slots[0], slots[-1] + 1, step)):
                k, v = (x[int(slots[0]) : int(slots[-1]) + 1 : int(step)] for x in (k, v))
            else:
                index = torch.from_numpy(slots).to(device)
                k, v = k[index], v[index]
        k, v = k[:, :longest], v[:, :longest]
    there = torch.from_numpy(node).to(device)
    if tokens.kv_lens is not None:
        kv_lens: Tensor | None = tokens.kv_lens[there]
    elif (lens == longest).all():
        kv_lens = None
    else:
        kv_lens = torch.from_numpy(lens).to(device)
    positions = segments.tok_begin[chosen][:, None] + np.arange(segments.num_tok[chosen[0]])
    in_order = np.array_equal(positions.reshape(-1), np.arange(plan.queries.token.size))
    if tokens.token is None:
        attended = None if in_order else torch.from_numpy(positions).to(device)
    else:
        attended = tokens.token[torch.from_numpy(positions).to(device)].long()
    k_start = None if tokens.kv_start is None else tokens.kv_start[there]
    return decomposed.Block(k, v, kv_lens, attended, k_start)


def _blocks_of_one_row(plan: WorkPlan, call: Call, tokens: Tokens) -> Iterator[decomposed.Block]:
    """Yield a block for each row and segment: a matrix product's bits depend on what is stacked into it."""
    device, queries = call.q.device, plan.queries
    ends = np.flatnonzero(np.diff(queries.row, append=-1)) + 1
    for begin, end in zip(np.append(0, ends)[:-1], ends, strict=True):
        # with a token of padding: a batch of one row, whose tokens are all there are, goes the same way
        attended = torch.arange(int(begin), int(end) + 1, device=device)
        if tokens.token is not None:
            attended = tokens.token[attended.clamp(max=queries.token.size - 1)].long()
        attended[-1] = -1
        for node in plan.tree.path(int(queries.row[begin])).tolist():
            kv_len = int(plan.kv_lens[node])
            if kv_len:
                k, v = (x[None, :kv_len] for x in call.nodes.node(node))
                kv_lens = None if tokens.kv_lens is None else tokens.kv_lens[node : node + 1]
                k_start = None if tokens.kv_start is None else tokens.kv_start[node : node + 1]
                yield decomposed.Block(k, v, kv_lens, attended[None], k_start)

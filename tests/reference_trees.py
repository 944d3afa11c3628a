"""Trees for the reference's tests, and how they become blocks of segments."""

from typing import NamedTuple

import numpy as np
import torch

from hydragen_reference.decomposed import Block, tree_attention
from hydragen_reference.oracle import tree_attention as oracle_attention


class Case(NamedTuple):
    """A batch of rows on a tree: lengths as lists, as a reader would write them down."""

    parents: list[int]
    kv_lens: list[int]
    row_to_node: list[int]
    q_lens: list[int]


CASES = {
    "one row": Case([-1], [5], [0], [1]),
    "two levels": Case([-1, 0, 0, 0, 0], [9, 3, 3, 3, 3], [1, 2, 3, 4], [1] * 4),
    "nothing shared": Case([-1, -1, -1], [4, 1, 6], [2, 0, 1], [2, 1, 3]),
    "several roots, uneven groups": Case(
        [-1, -1, 0, 0, 0, 1], [7, 4, 2, 5, 1, 3], [5, 3, 2, 4], [1, 2, 1, 2]
    ),
    "deep": Case([-1, 0, 1, 2, 3, 3], [3, 1, 2, 4, 1, 2], [4, 5, 5], [1, 1, 2]),
    "empty segments": Case([-1, 0, 0, -1, 3], [4, 0, 3, 0, 0], [1, 2, 4, 3], [1, 1, 2, 1]),
    "inner rows, repeated rows": Case([-1, 0, 0, 1], [6, 2, 3, 1], [0, 3, 0, 2, 1, 3], [1, 2, 1, 1, 3, 1]),
    "more queries than keys": Case([-1, 0, 0], [1, 1, 0], [1, 2, 0], [4, 3, 2]),
}


def draw(case, seed=0, heads=(4, 2), head_dims=(8, 8), dtype=torch.float64, sharpness=1.0):
    """Rounded float64 copies of q per row, and of k and v per node."""
    generator = torch.Generator().manual_seed(seed)

    def normal(lens, num_heads, dim, factor=1.0):
        drawn = [
            factor * torch.randn(n, num_heads, dim, generator=generator, dtype=torch.float64) for n in lens
        ]
        return [x.to(dtype).double() for x in drawn]

    q = normal(case.q_lens, heads[0], head_dims[0], sharpness)
    k, v = (normal(case.kv_lens, heads[1], dim) for dim in head_dims)
    return q, k, v


def structure(case):
    """Where each node starts on its path, which packed tokens attend to it, and every token's position."""
    starts = [0] * len(case.parents)
    for node, parent in enumerate(case.parents):
        if parent >= 0:
            starts[node] = starts[parent] + case.kv_lens[parent]
    tokens = [[] for _ in case.parents]
    q_pos = []
    for last_node, q_len in zip(case.row_to_node, case.q_lens, strict=True):
        row_tokens = range(len(q_pos), len(q_pos) + q_len)
        path_len = starts[last_node] + case.kv_lens[last_node]
        q_pos += range(path_len - q_len, path_len)
        node = last_node
        while node >= 0:
            tokens[node] += row_tokens
            node = case.parents[node]
    return starts, tokens, torch.tensor(q_pos, dtype=torch.int64)


def blocks_of(case, k, v, groups, dtype):
    """One block per group of nodes: padded with NaN to two keys more than needed, and tokens with -1."""
    starts, tokens, _ = structure(case)
    blocks = []
    for nodes in groups:
        kv_lens = [case.kv_lens[node] for node in nodes]
        padded = [
            torch.full((len(nodes), max(kv_lens) + 2, *x[0].shape[1:]), torch.nan, dtype=dtype)
            for x in (k, v)
        ]
        for x, source in zip(padded, (k, v), strict=True):
            for i, node in enumerate(nodes):
                x[i, : kv_lens[i]] = source[node]
        block_tokens = torch.full((len(nodes), max(len(tokens[node]) for node in nodes)), -1)
        for i, node in enumerate(nodes):
            block_tokens[i, : len(tokens[node])] = torch.tensor(tokens[node])
        k_start = torch.tensor([starts[node] for node in nodes])
        blocks.append(Block(*padded, torch.tensor(kv_lens), block_tokens, k_start))
    return blocks


def by_node(case):
    return [[node] for node in range(len(case.parents))]


def by_depth(case):
    depths = []
    for parent in case.parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return [[i for i, d in enumerate(depths) if d == depth] for depth in range(max(depths) + 1)]


def run_both(case, q, k, v, groups=by_depth, dtype=torch.float64, **options):
    blocks = blocks_of(case, k, v, groups(case), dtype)
    state = tree_attention(torch.cat(q).to(dtype), blocks, q_pos=structure(case)[2], **options)
    if "sinks" in options:
        options["sinks"] = options["sinks"].double().numpy()
    arrays = ([x.numpy() for x in tensors] for tensors in (q, k, v))
    out, lse = oracle_attention(*arrays, case.parents, case.row_to_node, **options)
    return state, torch.from_numpy(np.concatenate(out)), torch.from_numpy(np.concatenate(lse))

"""Changes of a problem that must not change its results: the left-hand sides of the laws.

Each takes a problem and its tensors and returns another problem with tensors made from them. The new
problem's ``seed`` and ``sharpness`` say where the tensors came from, but ``.tensors()`` would not build them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from hydragen.testing.inputs import Inputs, offsets
from hydragen.testing.problem import Problem

Case: TypeAlias = tuple[Problem, Inputs]

# Powers of two by which values of at most 4 stay within a type: outside of float16's where that is possible.
MAGNITUDES: dict[torch.dtype, tuple[int, ...]] = {
    torch.float16: (12,),
    torch.bfloat16: (40, -40),
    torch.float32: (40, -40),
    torch.float64: (200, -200),
}


def cut(problem: Problem, inputs: Inputs, node: int, at: int) -> Case:
    """Cut a node in two: its first ``at`` tokens stay, a new node below takes the others.

    Children and rows of the node go to the new one. The tokens of both halves lie where they lay.
    """
    _check_index("node", node, problem.num_nodes)
    _check_index("at", at, problem.kv_lens[node] + 1)
    return _splice(problem, inputs, node, at, problem.kv_lens[node] - at)


def splice_empty(problem: Problem, inputs: Inputs, node: int) -> Case:
    """Put an empty node between a node and everything below it; the node's rows end at the empty one."""
    _check_index("node", node, problem.num_nodes)
    return _splice(problem, inputs, node, problem.kv_lens[node], 0)


def _splice(problem: Problem, inputs: Inputs, node: int, first: int, second: int) -> Case:
    def moved(index: int) -> int:
        """What hung under or ended at the node now does so at the new one; later nodes move up by one."""
        return index + 1 if index >= node else index

    parents = [moved(parent) for parent in problem.parents]
    parents[node] = problem.parents[node]
    parents.insert(node + 1, node)
    kv_lens = [*problem.kv_lens[:node], first, second, *problem.kv_lens[node + 1 :]]
    return _restructured(problem, inputs, parents, kv_lens, [moved(end) for end in problem.row_to_node])


def add_empty_root(problem: Problem, inputs: Inputs) -> Case:
    """Hang all roots under an empty one."""
    parents = [-1, *(parent + 1 for parent in problem.parents)]
    return _restructured(
        problem, inputs, parents, [0, *problem.kv_lens], [end + 1 for end in problem.row_to_node]
    )


def flatten(problem: Problem, inputs: Inputs) -> Case:
    """Give each row its own root with a copy of all tokens along its path: nothing is shared any more."""
    paths = [problem.path(row) for row in range(problem.num_rows)]
    return _regrouped(problem, inputs, [-1] * problem.num_rows, paths, list(range(problem.num_rows)))


def unshare(problem: Problem, inputs: Inputs, node: int) -> Case:
    """Move a node's tokens to the front of each child, and into a new child for the rows that end there."""
    _check_index("node", node, problem.num_nodes)
    parts: list[tuple[int, ...]] = [
        (node, index) if parent == node else (index,) for index, parent in enumerate(problem.parents)
    ]
    parents, row_to_node = list(problem.parents), list(problem.row_to_node)
    parts[node] = ()
    if node in row_to_node:
        row_to_node = [len(parents) if end == node else end for end in row_to_node]
        parents.append(node)
        parts.append((node,))
    return _regrouped(problem, inputs, parents, parts, row_to_node)


def permute_rows(
    problem: Problem, inputs: Inputs, order: Sequence[int], *, nodes_along: bool = False
) -> Case:
    """Row i of the new problem is row ``order[i]`` of the old one.

    With `nodes_along` each row takes along the node that it ends at, which must be its own: so that rows
    still end at nodes in ascending order.
    """
    if sorted(order) != list(range(problem.num_rows)):
        raise ValueError(f"order must be a permutation of {problem.num_rows} rows, got {tuple(order)}")
    changed = replace(
        problem,
        row_to_node=tuple(problem.row_to_node[row] for row in order),
        q_lens=tuple(problem.q_lens[row] for row in order),
    )
    q = inputs.q[query_tokens(problem, order)]
    moved = replace(inputs, q=q, cu_seqlens_q=offsets(changed.q_lens))
    if not nodes_along:
        return changed, moved
    ends = changed.row_to_node
    if len(set(ends)) < len(ends) or set(ends) & set(problem.parents):
        raise ValueError(f"problem must have a node for each row alone, got {problem!r}")
    kept = [*(node for node in range(problem.num_nodes) if node not in ends), *ends]
    place = {node: index for index, node in enumerate(kept)}
    parents = [place.get(problem.parents[node], -1) for node in kept]
    return _regrouped(changed, moved, parents, [(node,) for node in kept], [place[node] for node in ends])


def add_unrelated(problem: Problem, inputs: Inputs, other: Problem, other_inputs: Inputs) -> Case:
    """Put another problem's nodes before this one's, and its rows before this one's, into the same batch."""
    for name in ("num_q_heads", "num_kv_heads", "head_dim", "head_dim_v", "dtype"):
        if getattr(problem, name) != getattr(other, name):
            raise ValueError(
                f"other.{name} must be the problem's, {getattr(problem, name)}, got {getattr(other, name)}"
            )
    shift = other.num_nodes
    changed = replace(
        problem,
        parents=(*other.parents, *(parent + shift if parent >= 0 else -1 for parent in problem.parents)),
        kv_lens=other.kv_lens + problem.kv_lens,
        row_to_node=(*other.row_to_node, *(end + shift for end in problem.row_to_node)),
        q_lens=other.q_lens + problem.q_lens,
    )
    both = Inputs(
        q=torch.cat([other_inputs.q, inputs.q]),
        k=torch.cat([other_inputs.k, inputs.k]),
        v=torch.cat([other_inputs.v, inputs.v]),
        cu_seqlens_q=offsets(changed.q_lens),
        cu_seqlens_k=offsets(changed.kv_lens),
        sinks=inputs.sinks,
    )
    return changed, both


def poison_unattended(problem: Problem, inputs: Inputs) -> Inputs:
    """The same with NaN as keys and values of the segments that are on no row's path."""
    attended = {node for row in range(problem.num_rows) for node in problem.path(row)}
    spoilt = torch.tensor([node not in attended for node in range(problem.num_nodes)])
    of_token = torch.repeat_interleave(spoilt, torch.tensor(problem.kv_lens))
    k, v = (x.masked_fill(of_token[:, None, None], math.nan) for x in (inputs.k, inputs.v))
    return replace(inputs, k=k, v=v)


def append_poison(problem: Problem, inputs: Inputs, tokens: int = 20) -> Case:
    """One more root behind all nodes, of NaN, that no row attends to."""
    changed = replace(problem, parents=(*problem.parents, -1), kv_lens=(*problem.kv_lens, tokens))
    k, v = (torch.cat([x, x.new_full((tokens, *x.shape[1:]), math.nan)]) for x in (inputs.k, inputs.v))
    return changed, replace(inputs, k=k, v=v, cu_seqlens_k=offsets(changed.kv_lens))


def repeat(problem: Problem, inputs: Inputs, copies: int, *, shared: bool) -> Case:
    """So many copies of all rows: below the same segments, or each with a copy of the whole tree."""
    if copies < 1:
        raise ValueError(f"copies must be at least 1, got {copies}")
    trees = 1 if shared else copies
    shifts = [0 if shared else copy * problem.num_nodes for copy in range(copies)]
    changed = replace(
        problem,
        parents=tuple(
            parent + shift if parent >= 0 else -1 for shift in shifts[:trees] for parent in problem.parents
        ),
        kv_lens=problem.kv_lens * trees,
        row_to_node=tuple(end + shift for shift in shifts for end in problem.row_to_node),
        q_lens=problem.q_lens * copies,
    )
    return changed, replace(
        inputs,
        q=inputs.q.repeat(copies, 1, 1),
        k=inputs.k.repeat(trees, 1, 1),
        v=inputs.v.repeat(trees, 1, 1),
        cu_seqlens_q=offsets(changed.q_lens),
        cu_seqlens_k=offsets(changed.kv_lens),
    )


def on_grid(tensor: Tensor) -> Tensor:
    """Values rounded to multiples of 1/8 within ±4: small sums and multiples are exact in every dtype."""
    return ((tensor.float() * 8).round() / 8).clamp(-4, 4).to(tensor.dtype)


def query_tokens(problem: Problem, order: Iterable[int]) -> Tensor:
    """Indices into ``q`` of the given rows' queries, row after row."""
    starts = [sum(problem.q_lens[:row]) for row in range(problem.num_rows)]
    return torch.cat([torch.arange(starts[row], starts[row] + problem.q_lens[row]) for row in order])


def shift_of_logits(problem: Problem, inputs: Inputs, constant: Tensor) -> Tensor:
    """By how much a constant ``[num_kv_heads, head_dim]``, added to every key, moves a query's logits.

    Returns
    -------
    float64 tensor [total_q, num_q_heads]
    """
    per_q_head = constant.double().repeat_interleave(problem.group_size, 0)
    return (inputs.q.double() * per_q_head).sum(-1) * problem.logit_scale


def _restructured(
    problem: Problem,
    inputs: Inputs,
    parents: Sequence[int],
    kv_lens: Sequence[int],
    row_to_node: Sequence[int],
) -> Case:
    """Another tree over the same tokens in the same places."""
    changed = replace(problem, parents=tuple(parents), kv_lens=tuple(kv_lens), row_to_node=tuple(row_to_node))
    return changed, replace(inputs, cu_seqlens_k=offsets(changed.kv_lens))


def _regrouped(
    problem: Problem,
    inputs: Inputs,
    parents: Sequence[int],
    parts: Sequence[tuple[int, ...]],
    row_to_node: Sequence[int],
) -> Case:
    """Another tree, each of whose nodes holds copies of some old nodes' tokens."""
    starts = inputs.cu_seqlens_k.tolist()
    tokens = [index for nodes in parts for node in nodes for index in range(starts[node], starts[node + 1])]
    kv_lens = [sum(problem.kv_lens[node] for node in nodes) for nodes in parts]
    source = torch.tensor(tokens, dtype=torch.long)
    changed, moved = _restructured(problem, inputs, parents, kv_lens, row_to_node)
    return changed, replace(moved, k=inputs.k[source], v=inputs.v[source])


def _check_index(name: str, value: int, size: int) -> None:
    if not 0 <= value < size:
        raise ValueError(f"{name} must be at least 0 and below {size}, got {value}")

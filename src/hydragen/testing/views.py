"""One problem, laid out for each interface: keys and values packed, by level or in pages, with any strides.

A view holds the arguments of ``hydragen.attention``. Memory that must not be read is NaN: the unused tail of
each segment and the gaps between strided elements.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from hydragen.testing.pages import PAGE_SIZES, paged
from hydragen.testing.problem import Problem

if TYPE_CHECKING:
    from hydragen.kv import KV, PackedKV
    from hydragen.testing.inputs import Inputs
    from hydragen.tree import PrefixTree

Memory = Literal["contiguous", "sliced", "interleaved", "heads_first", "shifted"]
"""Where a tensor's elements lie; see `restride`."""

KVLayout = Literal["packed", "levels", "packed_levels", "paged"]
"""How keys and values are passed; see `view`."""

MEMORY: tuple[Memory, ...] = get_args(Memory)
KV_LAYOUTS: tuple[KVLayout, ...] = get_args(KVLayout)


@dataclass(frozen=True, eq=False)
class View:
    """Arguments of ``hydragen.attention`` for one problem.

    Attributes
    ----------
    q
        ``[batch, q_len, num_q_heads, head_dim]``, or packed ``[total_q, num_q_heads, head_dim]``.
    kv
        A ``PackedKV`` or ``PagedKV`` of all nodes, or per level a pair ``(k, v)``, each ``[nodes, len,
        num_kv_heads, head_dim]``, or a ``PackedKV``.
    tree
        Who shares which segment.
    kv_lens
        Used tokens of each node, by node or by level; None if all memory is used.
    cu_seqlens_q
        Offsets of the rows in a packed ``q``, None for a batch.
    """

    q: Tensor
    kv: KV
    tree: PrefixTree
    kv_lens: list[int] | list[list[int]] | None
    cu_seqlens_q: Tensor | None

    def packed(self, tensor: Tensor) -> Tensor:
        """``out`` or ``lse`` of this view as ``[total_q, ...]``, row after row."""
        return tensor if self.cu_seqlens_q is not None else tensor.flatten(0, 1)


def view(
    problem: Problem,
    inputs: Inputs,
    kv_layout: KVLayout = "packed",
    *,
    spare: int = 0,
    memory: Memory | None = None,
) -> View:
    """The view of a problem in the given layout of keys and values.

    Parameters
    ----------
    kv_layout
        ``"packed"`` (`packed_view`), ``"levels"`` (`levels_view`), ``"packed_levels"`` (a ``PackedKV`` per
        level) or ``"paged"`` (`paged_view`).
    spare
        Tokens of unused capacity after each segment, NaN-filled.
    memory
        Where the elements of ``q``, ``k`` and ``v`` lie (`restride`); None for where they lie already.

    Raises
    ------
    ValueError
        If the layout or the strides are unknown, ``spare`` is negative, or ``inputs`` belong to another
        problem.
    """
    if kv_layout == "packed":
        return packed_view(problem, inputs, spare=spare, memory=memory)
    if kv_layout == "levels":
        return levels_view(problem, inputs, spare=spare, memory=memory)
    if kv_layout == "packed_levels":
        return packed_levels_view(problem, inputs, spare=spare, memory=memory)
    if kv_layout == "paged":
        return paged_view(problem, inputs, spare=spare, memory=memory)
    raise ValueError(f"kv_layout must be one of {', '.join(KV_LAYOUTS)}, got {kv_layout!r}")


def packed_view(problem: Problem, inputs: Inputs, *, spare: int = 0, memory: Memory | None = None) -> View:
    """Packed queries, keys and values, node after node; see `view` for the parameters."""
    from hydragen.kv import PackedKV  # noqa: PLC0415 - implementations without hydragen's types need no view

    _check(problem, inputs, spare)
    cu_seqlens_k = inputs.cu_seqlens_k
    k, v = inputs.k, inputs.v
    if spare:
        capacity = torch.tensor(problem.kv_lens) + spare
        cu_seqlens_k = torch.cat([torch.zeros(1), capacity.cumsum(0)]).to(torch.int32)
        starts = cu_seqlens_k[:-1].tolist()
        k = _spread(inputs.k, problem.kv_lens, starts, int(cu_seqlens_k[-1]))
        v = _spread(inputs.v, problem.kv_lens, starts, int(cu_seqlens_k[-1]))
    return View(
        q=restride(inputs.q, memory),
        kv=PackedKV(restride(k, memory), restride(v, memory), cu_seqlens_k),
        tree=_tree(problem),
        kv_lens=list(problem.kv_lens) if spare else None,
        cu_seqlens_q=inputs.cu_seqlens_q,
    )


def levels_view(problem: Problem, inputs: Inputs, *, spare: int = 0, memory: Memory | None = None) -> View:
    """Padded levels: level d holds the nodes of depth d in index order; see `view` for the parameters."""
    _check(problem, inputs, spare)
    starts = inputs.cu_seqlens_k.tolist()
    kv: list[tuple[Tensor, Tensor]] = []
    kv_lens: list[list[int]] = []
    for nodes in levels(problem.parents):
        lengths = [problem.kv_lens[node] for node in nodes]
        capacity = max(lengths) + spare
        padded = []
        for tensor in (inputs.k, inputs.v):
            level = _nan(tensor, (len(nodes), capacity, *tensor.shape[1:]))
            for index, node in enumerate(nodes):
                level[index, : lengths[index]] = tensor[starts[node] : starts[node + 1]]
            padded.append(restride(level, memory))
        kv.append((padded[0], padded[1]))
        kv_lens.append(lengths)
    return _by_level(problem, inputs, kv, kv_lens, memory)


def packed_levels_view(
    problem: Problem, inputs: Inputs, *, spare: int = 0, memory: Memory | None = None
) -> View:
    """Levels whose nodes lie end to end, however long each is; see `view` for the parameters."""
    from hydragen.kv import PackedKV  # noqa: PLC0415 - see packed_view

    _check(problem, inputs, spare)
    kv: list[PackedKV] = []
    kv_lens: list[list[int]] = []
    for nodes in levels(problem.parents):
        lengths = [problem.kv_lens[node] for node in nodes]
        starts = [0, *itertools.accumulate(length + spare for length in lengths)]
        k, v = (
            _spread(
                torch.cat([x.split(list(problem.kv_lens))[node] for node in nodes]),
                lengths,
                starts[:-1],
                starts[-1],
            )
            for x in (inputs.k, inputs.v)
        )
        kv.append(PackedKV(restride(k, memory), restride(v, memory), starts))
        kv_lens.append(lengths)
    return _by_level(problem, inputs, kv, kv_lens, memory)


def _by_level(
    problem: Problem,
    inputs: Inputs,
    kv: Sequence[tuple[Tensor, Tensor] | PackedKV],
    kv_lens: list[list[int]],
    memory: Memory | None,
) -> View:
    """Rows of equal ``q_len`` become a batch ``[batch, q_len, ...]``; ragged rows stay packed."""
    uniform = len(set(problem.q_lens)) == 1
    q = inputs.q.unflatten(0, (problem.num_rows, problem.q_lens[0])) if uniform else inputs.q
    return View(
        q=restride(q, memory),
        kv=kv,
        tree=_tree(problem),
        kv_lens=kv_lens,
        cu_seqlens_q=None if uniform else inputs.cu_seqlens_q,
    )


def paged_view(problem: Problem, inputs: Inputs, *, spare: int = 0, memory: Memory | None = None) -> View:
    """The pages of ``inputs``, or pages of a size that the problem's seed chooses; see `view`."""
    from hydragen.kv import PagedKV  # noqa: PLC0415 - see packed_view

    _check(problem, inputs, spare)
    seed = problem.seed
    pages = inputs.pages or paged(problem, inputs, PAGE_SIZES[seed % len(PAGE_SIZES)], seed, spare)
    k_cache, v_cache = restride(pages.k_cache, memory), restride(pages.v_cache, memory)
    return View(
        q=restride(inputs.q, memory),
        kv=PagedKV(k_cache, v_cache, pages.page_indptr, pages.page_indices),
        tree=_tree(problem),
        kv_lens=list(pages.kv_lens),
        cu_seqlens_q=inputs.cu_seqlens_q,
    )


def levels(parents: Sequence[int]) -> list[list[int]]:
    """Nodes by depth, in index order."""
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return [[node for node, at in enumerate(depths) if at == depth] for depth in range(max(depths) + 1)]


def restride(tensor: Tensor, memory: Memory | None) -> Tensor:
    """A tensor with the same values whose elements lie elsewhere; all memory between them is NaN.

    ``contiguous``; ``sliced``: cut out of a tensor that is larger on every side; ``interleaved``: every
    second element of the last dimension; ``heads_first``: heads (the last but one dimension) outermost;
    ``shifted``: contiguous, from the second element of their memory on, so that no wide load is aligned;
    None: where they lie already.

    Raises
    ------
    ValueError
        If ``memory`` is not one of these.
    """
    if memory is None:
        return tensor
    if memory == "contiguous":
        return tensor.contiguous()
    if memory == "sliced":
        larger = _nan(tensor, tuple(size + 2 for size in tensor.shape))
        target = larger[tuple(slice(1, -1) for _ in tensor.shape)]
    elif memory == "interleaved":
        target = _nan(tensor, (*tensor.shape, 2))[..., 1]
    elif memory == "heads_first":
        heads = tensor.dim() - 2
        target = _nan(tensor, tuple(tensor.movedim(heads, 0).shape)).movedim(0, heads)
    elif memory == "shifted":
        target = _nan(tensor, (tensor.numel() + 1,))[1:].view(tensor.shape)
    else:
        raise ValueError(f"memory must be one of {', '.join(MEMORY)}, got {memory!r}")
    return target.copy_(tensor)


def _nan(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.full(shape, math.nan, dtype=like.dtype, device=like.device)


def _spread(tensor: Tensor, lengths: Sequence[int], starts: Sequence[int], total: int) -> Tensor:
    """Move runs that lie one after the other to the given starts, NaN between them."""
    result = _nan(tensor, (total, *tensor.shape[1:]))
    for run, start in zip(tensor.split(list(lengths)), starts, strict=True):
        result[start : start + run.shape[0]] = run
    return result


def _tree(problem: Problem) -> PrefixTree:
    from hydragen.tree import PrefixTree  # noqa: PLC0415 - see packed_view

    # Structure only: the lengths come with the keys and values.
    return PrefixTree.from_parents(problem.parents, row_to_node=problem.row_to_node)


def _check(problem: Problem, inputs: Inputs, spare: int) -> None:
    if spare < 0:
        raise ValueError(f"spare must be at least 0, got {spare}")
    shape = (problem.total_kv, problem.num_kv_heads, problem.head_dim)
    if tuple(inputs.k.shape) != shape:
        raise ValueError(f"inputs.k must have the problem's shape {shape}, got {tuple(inputs.k.shape)}")

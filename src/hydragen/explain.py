"""What sharing saves: per segment, if its queries are batched; bytes, FLOPs and time with and without."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hydragen.host_ints import IntArray
from hydragen.layout import Segments
from hydragen.predict import predicted_seconds
from hydragen.queries import Heads, Queries
from hydragen.target import H200, Target, target_of
from hydragen.tiles import Tile
from hydragen.tree import PrefixTree
from hydragen.validation.explain import check_cuda, check_explain
from hydragen.work import WorkPlan, find_segments


@dataclass(frozen=True)
class SegmentCost:
    """Segments of one depth with equal keys and queries.

    Attributes
    ----------
    depth : int
        Nodes above it on its path.
    count : int
        How many such segments there are.
    kv_len : int
        Keys in each.
    num_rows, num_tokens : int
        Sequences, and query tokens, that attend to each.
    reads : int
        How many times each is read: once, with the queries of all its sequences stacked into one matrix; or
        once per sequence, or per group of them, where there is too little to do to be worth a partial result.
    batched : bool
        Whether it is read once for several sequences.
    block_m, num_splits : int
        Rows of the tile that computes it, if no mask or soft cap asks for a plain one; and the number of
        programs its keys are split over.
    bytes, bytes_unshared : int
        Keys and values read, all together: `reads` times per segment, or once per sequence.
    flops : int
        Multiplications and additions, all together; sharing does not change them.
    seconds, seconds_unshared : float
        The larger of FLOPs / peak and bytes / bandwidth.
    bound : str
        "memory" or "compute": which of the two it is with sharing.
    """

    depth: int
    count: int
    kv_len: int
    num_rows: int
    num_tokens: int
    reads: int
    batched: bool
    block_m: int
    num_splits: int
    bytes: int
    bytes_unshared: int
    flops: int
    seconds: float
    seconds_unshared: float
    bound: str


@dataclass(frozen=True)
class Explanation:
    """The answer to "does sharing pay?"; printing it gives a table.

    Attributes
    ----------
    segments : tuple of SegmentCost
        From the roots to the leaves.
    seconds, seconds_unshared : float
        Lower bounds for the whole call: compute and memory traffic overlap perfectly.
    predicted_seconds : float
        What the call should take with sharing, launches included, as a replayed graph; fitted to an H200.
    bytes, bytes_unshared, flops : int
        Keys and values read with and without sharing; multiplications and additions of both products.
    device : str
        Whose peak and bandwidth count.
    """

    segments: tuple[SegmentCost, ...]
    seconds: float
    seconds_unshared: float
    predicted_seconds: float
    bytes: int
    bytes_unshared: int
    flops: int
    device: str

    @property
    def speedup(self) -> float:
        """How many times less time with sharing than without, at best: of the two lower bounds.

        Of what calls should take, ``explain(tree.unshared(), ...).predicted_seconds / predicted_seconds``.
        """
        return self.seconds_unshared / self.seconds if self.seconds else 1.0

    def __str__(self) -> str:
        heading = (
            "depth",
            "segments",
            "keys",
            "rows",
            "batched",
            "tile",
            "splits",
            "MB",
            "MB unshared",
            "us",
            "bound",
        )
        lines = [heading]
        for s in self.segments:
            batched = "yes" if s.batched else "per row" if s.reads == s.num_rows else f"{s.reads} groups"
            numbers = (f"{s.bytes / 1e6:,.2f}", f"{s.bytes_unshared / 1e6:,.2f}", f"{s.seconds * 1e6:,.1f}")
            lines.append(
                (str(s.depth), f"{s.count:,}", f"{s.kv_len:,}", f"{s.num_rows:,}", batched, str(s.block_m))
                + (str(s.num_splits), *numbers, s.bound)
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(heading))]
        table = "\n".join(
            "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
        )
        return (
            f"{table}\n{self.device}: predicted {self.predicted_seconds * 1e6:,.1f} us; at best, all "
            f"overlapping, {self.seconds * 1e6:,.1f} us with sharing, {self.seconds_unshared * 1e6:,.1f} us "
            f"without ({self.speedup:.1f}x); "
            f"KV {self.bytes / 1e6:,.1f} MB read instead of {self.bytes_unshared / 1e6:,.1f} MB"
        )


def explain(
    tree: PrefixTree,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    q_len: int = 1,
    device: torch.device | str | None = None,
) -> Explanation:
    """Say what attention over a tree costs with and without sharing, without computing it.

    The bound of each segment and of the whole is max(FLOPs / peak, bytes / bandwidth), the roofline; masks
    are not taken into account.

    Parameters
    ----------
    tree : PrefixTree
        With its lengths (`kv_lens`).
    num_q_heads, num_kv_heads, head_dim, head_dim_v : int
        As in `attention`; `head_dim_v` defaults to `head_dim`.
    dtype : torch.dtype
        Of q, k and v.
    q_len : int
        Query tokens per row.
    device : optional
        Whose peak and bandwidth count: a CUDA device of this machine. Default: an H200 (790 TFLOP/s, 4.31
        TB/s).

    Returns
    -------
    Explanation

    Raises
    ------
    TypeError, ValueError
        If the tree has no lengths, or arguments are out of range.

    Examples
    --------
    >>> tree = PrefixTree.from_levels([[4096], [128] * 64])
    >>> round(explain(tree, num_q_heads=32, num_kv_heads=8, head_dim=128).speedup, 1)
    22.0
    """
    dims = (head_dim, head_dim if head_dim_v is None else head_dim_v)
    lens, heads, q_len = check_explain(tree, num_q_heads, num_kv_heads, *dims, dtype, q_len)
    target = H200 if device is None else target_of(check_cuda(device))
    queries = Queries.of(tree, np.arange(tree.num_rows) * q_len, np.full(tree.num_rows, q_len))
    segments, tiles = find_segments(tree, lens, queries, heads, target, batch_invariant=False)
    return _explanation(tree, lens, segments, tiles, heads, queries, target)


def explanation(plan: WorkPlan, runs_tiles: bool = True) -> Explanation:
    """Say what a plan does, and what that costs; of one whose tiles nobody runs, what an H200 would do."""
    segments, tiles, target = plan.work.segments, plan.work.tiles, plan.target
    if not runs_tiles:
        target = H200
        segments, tiles = find_segments(
            plan.tree, plan.kv_lens, plan.queries, plan.heads, target, plan.batch_invariant,
            reserved=plan.reserved, page_size=plan.page_size, growing=plan.lens_on_device,
        )  # fmt: skip
    return _explanation(plan.tree, plan.kv_lens, segments, tiles, plan.heads, plan.queries, target)


def _explanation(
    tree: PrefixTree,
    kv_lens: IntArray,
    segments: Segments,
    tiles: tuple[Tile, ...],
    heads: Heads,
    queries: Queries,
    target: Target,
) -> Explanation:
    rows_before = np.append(0, np.cumsum(np.diff(queries.row, prepend=-1) != 0))
    run = np.repeat(np.arange(segments.node.size), np.diff(segments.indptr))
    first = segments.tok_begin[run]
    num_tok = segments.num_tok[run]
    # a node may be in several runs: it is read in each of them
    node, one, of, reads = np.unique(
        segments.links, return_index=True, return_inverse=True, return_counts=True
    )
    num_rows, num_tokens = np.zeros_like(node), np.zeros_like(node)
    np.add.at(num_rows, of, rows_before[first + num_tok] - rows_before[first])
    np.add.at(num_tokens, of, num_tok)
    tile, size = segments.tile[run][one], segments.split_size[run][one]
    columns = np.stack([tree.depth[node], kv_lens[node], num_rows, num_tokens, reads, tile, size], 1)
    kinds, counts = np.unique(columns, axis=0, return_counts=True)
    costs = []
    for (depth, kv_len, rows, tokens, times, index, size), count in zip(
        kinds.tolist(), counts.tolist(), strict=True
    ):
        block_m, splits = tiles[index].rows, -(-kv_len // size)
        costs.append(_cost(depth, kv_len, rows, tokens, times, count, block_m, splits, heads, target))
    flops, shared, unshared = (
        sum(getattr(c, name) for c in costs) for name in ("flops", "bytes", "bytes_unshared")
    )
    least = _bound(flops, shared, target)[0]
    return Explanation(
        tuple(costs),
        least,
        _bound(flops, unshared, target)[0],
        max(least, predicted_seconds(segments, tiles, heads, queries.token.size, target)),
        shared,
        unshared,
        flops,
        target.name or f"sm_{target.arch}",
    )


def _cost(
    depth: int,
    kv_len: int,
    rows: int,
    tokens: int,
    reads: int,
    count: int,
    block_m: int,
    splits: int,
    heads: Heads,
    target: Target,
) -> SegmentCost:
    dims = heads.head_dim + heads.head_dim_v
    once = count * kv_len * heads.num_kv_heads * dims * heads.itemsize
    shared, unshared = once * reads, once * rows
    flops = 2 * count * kv_len * tokens * heads.num_q_heads * dims
    seconds, bound = _bound(flops, shared, target)
    return SegmentCost(
        depth, count, kv_len, rows, tokens, reads, rows > 1 and reads == 1, block_m, splits, shared, unshared,
        flops, seconds, _bound(flops, unshared, target)[0], bound,
    )  # fmt: skip


def _bound(flops: int, num_bytes: int, target: Target) -> tuple[float, str]:
    compute, memory = flops / target.flops, num_bytes / target.bandwidth
    return max(compute, memory), "compute" if compute > memory else "memory"

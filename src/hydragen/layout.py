"""From segments to tables: splits, row blocks and places, as the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hydragen.host_ints import IntArray
from hydragen.kv import NodeKV
from hydragen.queries import Heads, Queries
from hydragen.ragged import descending, expand, offsets, ranges
from hydragen.runs import Runs
from hydragen.tiles import Tile

# The columns of the work table, as kernels/attend.py reads them.
ITEM_COLUMNS = (
    *("node", "level", "slot", "begin", "end", "tok_begin", "num_tok", "row_begin", "dest"),
    *("num_segments", "link_begin"),
    *("second_node", "second_level", "second_slot", "second_begin", "second_end"),
)
# The columns of the table of links, as kernels/segment.py reads them: an item's segments from the third on.
LINK_COLUMNS = ITEM_COLUMNS[:5]


@dataclass(frozen=True, eq=False)
class Launch:
    """All work of one kind of tile: one launch of `items` x num_kv_heads / `heads` programs.

    `links` has rows if some item has more than two segments.
    """

    tile: Tile
    heads: int
    items: NDArray[np.int32]
    links: NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, len(LINK_COLUMNS)), np.int32))

    @property
    def has_runs(self) -> bool:
        """Whether some item has several segments."""
        return bool((self.items[:, ITEM_COLUMNS.index("num_segments")] > 1).any())


@dataclass(frozen=True, eq=False)
class Segments(Runs):
    """The runs of keys that somebody attends to, each with its tile, KV heads per program and split size."""

    tile: IntArray
    heads: IntArray
    split_size: IntArray
    step: int


@dataclass(frozen=True, eq=False)
class Work:
    """The tables of one attention call.

    Attributes
    ----------
    segments : Segments
    tiles : the tiles that `segments.tile` indexes
    launches : one per kind of tile that has work
    final : bool
        Every token has one partial: the tiles write the output themselves and there is no merge.
    num_partials : int
        Rows of the partial buffers, each [num_q_heads, head_dim_v].
    merge_indptr, merge_indices : int32
        Compressed rows: query token t (in tree order) merges partial rows indices[indptr[t]:indptr[t + 1]],
        root to leaf.
    """

    segments: Segments
    tiles: tuple[Tile, ...]
    launches: tuple[Launch, ...]
    final: bool
    num_partials: int
    merge_indptr: NDArray[np.int32]
    merge_indices: NDArray[np.int32]


def lay_out_work(
    nodes: NodeKV,
    kv_lens: IntArray,
    queries: Queries,
    segments: Segments,
    tiles: tuple[Tile, ...],
    heads: Heads,
    may_be_final: bool,
) -> Work:
    """Cut the segments into splits and row blocks, give each its place, and list every token's partials.

    With `may_be_final` there is no merge where every token has one partial.
    """
    num_splits = -(-segments.kv_len // segments.split_size)
    split_of, split = expand(num_splits)
    begin = split * segments.split_size[split_of]
    end = np.minimum(begin + segments.split_size[split_of], segments.kv_len[split_of])
    tok_begin, num_tok = segments.tok_begin[split_of], segments.num_tok[split_of]
    partials_before = offsets(num_tok)
    pieces = _pieces(segments, kv_lens, split_of, begin, end)

    num_tokens = queries.token.size
    token_of_partial = ranges(tok_begin, num_tok)
    partials_per_token = np.bincount(token_of_partial, minlength=num_tokens)
    final = may_be_final and bool((partials_per_token == 1).all())

    # One launch per kind of tile. The largest first: they are bound by compute, and what follows fills the
    # room they leave. Of each the longest items first, so that the hardware scheduler balances the end; equal
    # ones stay neighbours.
    tile_of, together = segments.tile[split_of], segments.heads[split_of]
    order = descending(pieces.num_keys)
    order = order[descending(tile_of[order])]
    block_m = np.array([tile.block_m for tile in tiles])[tile_of]
    blocks = -(-num_tok * heads.group_size * together // block_m)[order]
    which, block = expand(blocks)
    source = order[which]
    num_pieces = np.diff(pieces.indptr)
    count = num_pieces[source]
    first = pieces.columns(nodes, pieces.indptr[source])
    # where there is no second segment the first stands once more, unread
    several = count > 1
    second = pieces.columns(nodes, pieces.indptr[source] + several) if several.any() else first
    further = offsets(np.maximum(num_pieces[order] - 2, 0))
    columns = {
        **dict(zip(LINK_COLUMNS, first, strict=True)),
        "tok_begin": tok_begin[source],
        "num_tok": num_tok[source],
        "row_begin": block * block_m[source],
        "dest": partials_before[source],
        "num_segments": count,
        "link_begin": further[which],
        **dict(zip(ITEM_COLUMNS[-len(LINK_COLUMNS) :], second, strict=True)),
    }
    table = np.empty((source.size, len(ITEM_COLUMNS)), np.int32)
    for index, name in enumerate(ITEM_COLUMNS):
        table[:, index] = columns[name]
    links = _links(pieces, nodes, order, further)
    launches = []
    changes = np.flatnonzero(np.diff(tile_of[order], prepend=-1)).tolist()
    items_before = offsets(blocks)
    for begins, ends in pairwise([*changes, order.size]):
        items = table[items_before[begins] : items_before[ends]]
        items[:, ITEM_COLUMNS.index("link_begin")] -= further[begins]
        of_tile = tiles[tile_of[order[begins]]], int(together[order[begins]])
        launches.append(Launch(*of_tile, items, links[further[begins] : further[ends]]))

    if final:
        empty = np.zeros(0, np.int32)
        return Work(segments, tiles, tuple(launches), True, 0, empty, empty)
    order = np.argsort(token_of_partial, kind="stable")
    indptr = offsets(partials_per_token)
    return Work(
        segments,
        tiles,
        tuple(launches),
        False,
        int(partials_before[-1]),
        indptr.astype(np.int32),
        order.astype(np.int32),
    )


@dataclass(frozen=True, eq=False)
class _Pieces:
    """What each split attends to: keys [begin, end) of `node`.

    Those of split s are indptr[s] : indptr[s + 1].
    """

    node: IntArray
    begin: IntArray
    end: IntArray
    indptr: IntArray

    @property
    def num_keys(self) -> IntArray:
        """Keys of each split."""
        keys = self.end - self.begin
        return keys if keys.size == self.indptr.size - 1 else np.add.reduceat(keys, self.indptr[:-1])

    def columns(self, nodes: NodeKV, which: IntArray) -> list[IntArray]:
        """LINK_COLUMNS of some pieces."""
        node = self.node[which]
        return [node, nodes.level[node], nodes.slot[node], self.begin[which], self.end[which]]


def _pieces(
    segments: Segments, kv_lens: IntArray, split_of: IntArray, begin: IntArray, end: IntArray
) -> _Pieces:
    """Cut the runs: split s covers keys [begin[s], end[s]) of run split_of[s]."""
    if segments.links.size == segments.node.size:  # no run has several nodes
        return _Pieces(segments.links[split_of], begin, end, np.arange(split_of.size + 1))
    # In keys of all runs, end to end: a split goes from the node in which it begins to the one in which it
    # ends. It begins at a multiple of the step, so it has keys in the first. That a node alone is not rounded
    # up in its run makes no difference: what follows is counted from the run's own begin.
    lens = kv_lens[segments.links]
    starts = offsets(-(-lens // segments.step) * segments.step)
    before = starts[segments.indptr[split_of]]
    first = np.searchsorted(starts, before + begin, side="right") - 1
    counts = np.searchsorted(starts, before + end) - first
    link, of = ranges(first, counts), np.repeat(np.arange(split_of.size), counts)
    since = starts[link] - before[of]
    low, high = np.maximum(begin[of] - since, 0), np.minimum(end[of] - since, lens[link])
    return _Pieces(segments.links[link], low, high, offsets(counts))


def _links(pieces: _Pieces, nodes: NodeKV, order: IntArray, before: IntArray) -> NDArray[np.int32]:
    """Return the table of the pieces of the splits `order`, from the third of each on: before[-1] rows."""
    if not before[-1]:
        return np.zeros((0, len(LINK_COLUMNS)), np.int32)
    which = ranges(pieces.indptr[order] + 2, np.diff(before))
    return np.stack(pieces.columns(nodes, which), axis=1).astype(np.int32)

"""From segments to tables: splits, row blocks and places, as the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hydragen.host_ints import IntArray
from hydragen.kv import NodeKV
from hydragen.queries import Heads, Queries
from hydragen.ragged import changes, descending, expand, offsets, ranges
from hydragen.runs import Runs
from hydragen.tiles import Tile
from hydragen.warp_tiles import WARP_ROWS

# The columns of the work table, as kernels/attend.py reads them.
ITEM_COLUMNS = (
    *("node", "level", "slot", "begin", "end", "tok_begin", "num_tok", "row_begin", "dest"),
    *("num_segments", "link_begin"),
    *("second_node", "second_level", "second_slot", "second_begin", "second_end"),
)
# The columns of the table of links, as kernels/segment.py reads them: an item's segments from the third on.
LINK_COLUMNS = ITEM_COLUMNS[:5]
_FIRST, _SECOND = slice(0, 5), slice(11, 16)
_TOK_BEGIN, _NUM_TOK, _ROW_BEGIN, _DEST, _NUM_SEGMENTS, _LINK_BEGIN = range(5, 11)


@dataclass(frozen=True, eq=False)
class Launch:
    """All work of one kind of tile: one launch of `items` x num_kv_heads / `heads` programs.

    `links` has rows if some item has more than two segments; `num_items` an element if only so many items
    are in use, and the others room for another tree.
    """

    tile: Tile
    heads: int
    items: NDArray[np.int32]
    links: NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, len(LINK_COLUMNS)), np.int32))
    num_items: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))

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
    split_of, split = expand(-(-segments.kv_len // segments.split_size))
    size = segments.split_size[split_of]
    begin = split * size
    end = np.minimum(begin + size, segments.kv_len[split_of])
    pieces = _pieces(segments, kv_lens, split_of, begin, end)
    num_tok = segments.num_tok[split_of]
    partials_before = offsets(num_tok)

    # One launch per kind of tile. The largest first: they are bound by compute, and what follows fills the
    # room they leave. Of each the longest items first, so that the hardware scheduler balances the end; equal
    # ones stay neighbours.
    tile_of = segments.tile[split_of]
    order = descending(tile_of, pieces.num_keys)
    block_m = np.array([tile.block_m for tile in tiles])[segments.tile]
    blocks = -(-segments.num_tok * (segments.heads * heads.group_size) // block_m)
    # A tile of one warp knows no blocks of an item's rows: more tokens than it has columns for are items of
    # their own.
    alone = np.array([tile.warp is not None for tile in tiles])[segments.tile]
    most = max(1, WARP_ROWS // heads.group_size)
    blocks = np.where(alone, -(-segments.num_tok // most), blocks)
    which, block = expand(blocks[split_of[order]])
    source = order[which]
    run = split_of[source]
    columns = np.empty((len(ITEM_COLUMNS), which.size), np.int32)
    before = np.where(alone[run], block * most, 0)
    columns[_TOK_BEGIN] = segments.tok_begin[run] + before
    columns[_NUM_TOK] = np.where(alone[run], np.minimum(num_tok[source] - before, most), num_tok[source])
    columns[_ROW_BEGIN] = np.where(alone[run], 0, block * block_m[run])
    columns[_DEST] = partials_before[source] + before
    links = _fill_pieces(columns, pieces, nodes, order, which)
    table = columns.T.copy()
    launches = []
    tile_of = segments.tile[run]
    for first, last in pairwise([*changes(tile_of).tolist(), tile_of.size]):
        tile, together = tiles[int(tile_of[first])], int(segments.heads[run[first]])
        launches.append(_launch(tile, together, table[first:last], links))

    num_partials, num_tokens = int(partials_before[-1]), queries.token.size
    token = ranges(segments.tok_begin[split_of], num_tok, partials_before)
    per_token = np.bincount(token, minlength=num_tokens)
    if may_be_final and num_partials == num_tokens and bool((per_token == 1).all()):
        empty = np.zeros(0, np.int32)
        return Work(segments, tiles, tuple(launches), True, 0, empty, empty)
    merge = offsets(per_token).astype(np.int32), token.argsort(kind="stable").astype(np.int32)
    return Work(segments, tiles, tuple(launches), False, num_partials, *merge)


@dataclass(frozen=True, eq=False)
class _Pieces:
    """What each split attends to: keys [begin, end) of `node`.

    Those of split s are indptr[s] : indptr[s + 1]; without `indptr` every split has one.
    """

    node: IntArray
    begin: IntArray
    end: IntArray
    indptr: IntArray | None = None

    @property
    def num_keys(self) -> IntArray:
        """Keys of each split."""
        keys = self.end - self.begin
        return keys if self.indptr is None else np.add.reduceat(keys, self.indptr[:-1])

    def fill(self, columns: NDArray[np.int32], nodes: NodeKV, which: IntArray) -> None:
        """Write LINK_COLUMNS of some pieces."""
        node = self.node[which]
        columns[0], columns[1], columns[2] = node, nodes.level[node], nodes.slot[node]
        columns[3], columns[4] = self.begin[which], self.end[which]


def _pieces(
    segments: Segments, kv_lens: IntArray, split_of: IntArray, begin: IntArray, end: IntArray
) -> _Pieces:
    """Cut the runs: split s covers keys [begin[s], end[s]) of run split_of[s]."""
    if segments.links.size == segments.node.size:  # no run has several nodes
        return _Pieces(segments.links[split_of], begin, end)
    # In keys of all runs, end to end: a split goes from the node in which it begins to the one in which it
    # ends. It begins at a multiple of the step, so it has keys in the first. That a node alone is not rounded
    # up in its run makes no difference: what follows is counted from the run's own begin.
    lens = kv_lens[segments.links]
    starts = offsets(-(-lens // segments.step) * segments.step)
    before = starts[segments.indptr[split_of]]
    first = np.searchsorted(starts, before + begin, side="right") - 1
    counts = np.searchsorted(starts, before + end) - first
    indptr = offsets(counts)
    link, of = ranges(first, counts, indptr), np.repeat(np.arange(split_of.size), counts)
    since = starts[link] - before[of]
    low, high = np.maximum(begin[of] - since, 0), np.minimum(end[of] - since, lens[link])
    return _Pieces(segments.links[link], low, high, indptr)


def _fill_pieces(
    columns: NDArray[np.int32], pieces: _Pieces, nodes: NodeKV, order: IntArray, which: IntArray
) -> NDArray[np.int32] | None:
    """Write what items attend to into their columns: item i has the pieces of split order[which[i]].

    Returns the table of links: the pieces of the splits `order`, from the third of each on; None if no split
    has two.
    """
    first, second = columns[_FIRST], columns[_SECOND]
    if pieces.indptr is None:
        pieces.fill(first, nodes, order[which])
        columns[_NUM_SEGMENTS], columns[_LINK_BEGIN] = 1, 0
        second[...] = first
        return None
    begin = pieces.indptr[order]
    count = pieces.indptr[order + 1] - begin
    further = np.maximum(count - 2, 0)
    before = offsets(further)
    pieces.fill(first, nodes, begin[which])
    # where there is no second piece the first stands once more, unread
    pieces.fill(second, nodes, (begin + (count > 1))[which])
    columns[_NUM_SEGMENTS], columns[_LINK_BEGIN] = count[which], before[which]
    links = np.empty((len(LINK_COLUMNS), int(before[-1])), np.int32)
    pieces.fill(links, nodes, ranges(begin + 2, further, before))
    return links.T.copy()


def _launch(tile: Tile, heads: int, items: NDArray[np.int32], links: NDArray[np.int32] | None) -> Launch:
    """Return the launch of some items, with the links of these alone."""
    if links is None:
        return Launch(tile, heads, items)
    begin = int(items[0, _LINK_BEGIN])
    end = int(items[-1, _LINK_BEGIN]) + max(int(items[-1, _NUM_SEGMENTS]) - 2, 0)
    items[:, _LINK_BEGIN] -= begin
    return Launch(tile, heads, items, links[begin:end])

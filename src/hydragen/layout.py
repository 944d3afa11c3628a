"""From segments to tables: splits, row blocks and places, as the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hydragen.host_ints import IntArray
from hydragen.kv import NodeKV
from hydragen.queries import Heads, Queries
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
    split_of, split = _expand(num_splits)
    begin = split * segments.split_size[split_of]
    end = np.minimum(begin + segments.split_size[split_of], segments.kv_len[split_of])
    tok_begin, num_tok = segments.tok_begin[split_of], segments.num_tok[split_of]
    partials_before = np.append(0, np.cumsum(num_tok))
    pieces = _pieces(segments, kv_lens, split_of, begin, end)

    num_tokens = queries.token.size
    entry_of, within = _expand(num_tok)
    token_of_partial = tok_begin[entry_of] + within
    partials_per_token = np.bincount(token_of_partial, minlength=num_tokens)
    final = may_be_final and bool((partials_per_token == 1).all())

    # One launch per kind of tile. The largest first: they are bound by compute, and what follows fills the
    # room they leave.
    kind = segments.tile[split_of]
    launches = []
    for this in np.unique(kind)[::-1]:
        tile, chosen = tiles[this], np.flatnonzero(kind == this)
        # longest first, so that the hardware scheduler balances the end; stable, so that neighbours stay
        # together
        chosen = chosen[np.argsort(-pieces.num_keys[chosen], kind="stable")]
        together = int(segments.heads[split_of[chosen[0]]])
        blocks = -(-num_tok[chosen] * heads.group_size * together // tile.block_m)
        which, block = _expand(blocks)
        source = chosen[which]
        count = np.diff(pieces.indptr)[source]
        place, links = _links(pieces, nodes, chosen)
        first = pieces.columns(nodes, pieces.indptr[source])
        # where there is no second segment the first stands once more, unread
        several = count > 1
        second = pieces.columns(nodes, pieces.indptr[source] + several) if several.any() else first
        columns = {
            **dict(zip(LINK_COLUMNS, first, strict=True)),
            "tok_begin": tok_begin[source],
            "num_tok": num_tok[source],
            "row_begin": block * tile.block_m,
            "dest": partials_before[source],
            "num_segments": count,
            "link_begin": place[which],
            **dict(zip(ITEM_COLUMNS[-len(LINK_COLUMNS) :], second, strict=True)),
        }
        table = np.empty((source.size, len(ITEM_COLUMNS)), np.int32)
        for index, name in enumerate(ITEM_COLUMNS):
            table[:, index] = columns[name]
        launches.append(Launch(tile, together, table, links))

    if final:
        empty = np.zeros(0, np.int32)
        return Work(segments, tiles, tuple(launches), True, 0, empty, empty)
    order = np.argsort(token_of_partial, kind="stable")
    indptr = np.append(0, np.cumsum(partials_per_token))
    return Work(
        segments,
        tiles,
        tuple(launches),
        False,
        int(partials_before[-1]),
        indptr.astype(np.int32),
        order.astype(np.int32),
    )


def _expand(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Return (i, j) for i over `counts` and j over range(counts[i]), as two flat arrays."""
    owner = np.repeat(np.arange(counts.size), counts)
    first = np.cumsum(counts) - counts
    return owner, np.arange(owner.size) - first[owner]


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
        before = np.append(0, np.cumsum(self.end - self.begin))
        return np.diff(before[self.indptr])

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
    lens = kv_lens[segments.links]
    several = np.repeat(np.diff(segments.indptr) > 1, np.diff(segments.indptr))
    step = segments.step
    before = np.cumsum(np.where(several, -(-lens // step) * step, lens))
    starts = np.append(0, before[:-1])
    starts -= np.repeat(starts[segments.indptr[:-1]], np.diff(segments.indptr))
    of, within = _expand(np.diff(segments.indptr)[split_of])
    link = segments.indptr[split_of[of]] + within
    low = np.maximum(begin[of] - starts[link], 0)
    high = np.minimum(end[of] - starts[link], lens[link])
    there = low < high
    counts = np.bincount(of[there], minlength=split_of.size)
    return _Pieces(segments.links[link[there]], low[there], high[there], np.append(0, np.cumsum(counts)))


def _links(pieces: _Pieces, nodes: NodeKV, chosen: IntArray) -> tuple[IntArray, NDArray[np.int32]]:
    """Return where the pieces of the splits `chosen` go on in a table, from the third on, and that table."""
    further = np.maximum(np.diff(pieces.indptr)[chosen] - 2, 0)
    of, within = _expand(further)
    table = np.stack(pieces.columns(nodes, pieces.indptr[chosen[of]] + 2 + within), axis=1)
    return np.cumsum(further) - further, table.astype(np.int32)

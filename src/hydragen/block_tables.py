"""Block tables, as inference engines keep them, as a tree: rows whose tables begin alike share its nodes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from hydragen.host_ints import IntArray, as_int_vector, as_positive_int
from hydragen.kv import PagedKV
from hydragen.radix import build_radix_tree
from hydragen.tree import PrefixTree
from hydragen.tree_checks import listed
from hydragen.validation.pages import check_pools

BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
# Of a row: lengths are int32 on the device.
_MOST_TOKENS = 2**31


def from_block_tables(
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Iterable[object] | Tensor,
    seq_lens: object,
    *,
    new_tokens: object = 0,
    min_shared: int = 1,
) -> tuple[PrefixTree, PagedKV]:
    """Find what rows share whose pages are listed row by row.

    So they are in vLLM (PagedAttention, Kwon et al., 2023, arXiv 2309.06180, section 4). Rows share the pages
    in which their tables begin alike, as far as these are full. The tree holds its nodes' tokens (`kv_lens`):
    where lengths grow, pass them to `plan` in a tensor.

    Parameters
    ----------
    k_cache : tensor [num_pages, page_size, num_kv_heads, head_dim]
    v_cache : tensor [num_pages, page_size, num_kv_heads, head_dim_v]
        The pool, as in `PagedKV`, in the dtype of the queries to come.
    block_tables : integers [num_rows, most pages of a row], or a list of page numbers per row; on the host
        Entries after those that a row's tokens need may be any integers.
    seq_lens : integers [num_rows], on the host
        Tokens of each row that are in the pool.
    new_tokens : int, or integers [num_rows]
        Tokens for which each row shall have room besides, in pages of its own that its table lists: it then
        ends at a node of its own, to which `Plan.append` can write. 0 for rows that have finished.
    min_shared : int
        Pages that a run must have for a segment of its own, as in `PrefixTree.from_token_ids`.

    Returns
    -------
    (PrefixTree, PagedKV)
        Row r's path is its sequence; node i has the pages that it fills, and those for new tokens.

    Raises
    ------
    TypeError, ValueError
        If the pools do not fit together, or tables are too short for the tokens, name pages outside of the
        pool, or give new tokens a place that another row has.

    Examples
    --------
    >>> import torch
    >>> pool = torch.randn(2, 8, 16, 2, 64)
    >>> tree, kv = from_block_tables(*pool, [[1, 2, 3], [1, 2, 5]], [40, 33])
    >>> tree.parents, tree.kv_lens, kv.page_indices
    (array([-1,  0,  0]), array([32,  8,  1]), array([1, 2, 3, 5]))
    """
    num_pages, size = check_pools(k_cache, v_cache, "k_cache", "v_cache", None)[0].shape[:2]
    least = as_positive_int(min_shared, "min_shared")
    tables, sizes = _matrix(block_tables)
    lens = as_int_vector(seq_lens, "seq_lens")
    one = isinstance(new_tokens, int | np.integer)
    room = as_int_vector(np.full(sizes.size, new_tokens) if one else new_tokens, "new_tokens")
    for numbers, name in ((lens, "seq_lens"), (room, "new_tokens")):
        _check_counts(numbers, name, sizes.size)
    counts = -(-(lens + room) // size)
    names = _names(tables, sizes, counts, lens, room, num_pages, size)
    rows = [row[:count] for row, count in zip(names, counts.tolist(), strict=True)]
    found = build_radix_tree(rows, least)
    which, pages = np.divmod(found.token_ids, max(num_pages, 1))
    held = np.where(which == 0, size, (which - 1) % (size + 1))  # tokens of each page
    offsets = np.append(0, np.cumsum(found.kv_lens))
    kv_lens = np.diff(np.append(0, np.cumsum(held))[offsets])
    nodes = found.parents, kv_lens, offsets, found.row_to_node
    parents, kv_lens, offsets, ends = _resting(*nodes, room == 0) if room.any() else nodes
    tree = PrefixTree.from_parents(parents, kv_lens, row_to_node=ends)
    return tree, PagedKV(k_cache, v_cache, offsets, pages)


def _resting(
    parents: IntArray, kv_lens: IntArray, offsets: IntArray, ends: IntArray, rests: BoolArray
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Let rows that have finished end at empty nodes without pages, by which `Plan.append` knows them."""
    above, which = np.unique(ends[rests], return_inverse=True)
    moved = ends.copy()
    moved[rests] = parents.size + which
    return (
        np.append(parents, above),
        np.append(kv_lens, np.zeros(above.size, np.int64)),
        np.append(offsets, np.full(above.size, offsets[-1])),
        moved,
    )


def _check_counts(numbers: IntArray, name: str, num_rows: int) -> None:
    if numbers.size != num_rows:
        raise ValueError(
            f"{name} must hold a number for each of the {num_rows} rows of block_tables, got {numbers.size}; "
            "give the tokens of each row"
        )
    wrong = (numbers < 0) | (numbers >= _MOST_TOKENS)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"{name} must hold numbers from 0 to 2**31 - 1, got {numbers[row]} for row {row}; give the "
            "tokens of each row"
        )


def _matrix(block_tables: object) -> tuple[IntArray, IntArray]:
    """Return the tables, int64 [num_rows, most pages of a row], and how many pages each row lists."""
    if isinstance(block_tables, Tensor):
        given = block_tables
        try:
            block_tables = given.numpy()
        except (TypeError, RuntimeError, ValueError):  # elsewhere, sparse, nested, bfloat16, without data
            raise TypeError(
                "block_tables must be lists, an array or a dense CPU tensor of integers, got "
                f"{given.dtype} ({given.layout}) on {given.device}; pass it dense, as .long().cpu()"
            ) from None
    if isinstance(block_tables, np.ndarray):
        if block_tables.ndim != 2:
            raise ValueError(
                "block_tables must be [num_rows, most pages of a row], got shape "
                f"{list(block_tables.shape)}; give a list of page numbers for each row"
            )
        flat = as_int_vector(block_tables.reshape(-1), "block_tables")
        return flat.reshape(block_tables.shape), np.full(block_tables.shape[0], block_tables.shape[1])
    rows = listed(block_tables, "block_tables", "lists of page numbers, one per row")
    if rows and isinstance(rows[0], int | np.integer):
        raise TypeError(
            f"block_tables must be a list of page numbers for each row, got the number {rows[0]} for the "
            "first; wrap a single table in a list"
        )
    vectors = [as_int_vector(row, f"block_tables[{i}]") for i, row in enumerate(rows)]
    sizes = np.array([vector.size for vector in vectors], np.int64)
    tables = np.zeros((sizes.size, int(sizes.max(initial=0))), np.int64)
    for row, vector in zip(tables, vectors, strict=True):
        row[: vector.size] = vector
    return tables, sizes


def _names(
    tables: IntArray,
    sizes: IntArray,
    counts: IntArray,
    lens: IntArray,
    room: IntArray,
    num_pages: int,
    size: int,
) -> IntArray:
    """Return the first counts[r] pages of row r by names that are alike where rows may share them.

    A full page's name is its number. Those of others say as well how many tokens they hold, since rows may
    fill one page differently far; and whose they are if tokens are to come.
    """
    if (sizes < counts).any():
        row = int((sizes < counts).argmax())
        raise ValueError(
            f"block_tables[{row}] must list {counts[row]} pages for {lens[row]} tokens"
            f"{f' and {room[row]} new ones' * bool(room[row])}, got {sizes[row]}; take pages before"
        )
    used = tables[:, : int(counts.max(initial=0))]
    at = np.arange(used.shape[1])
    needed = at < counts[:, None]
    wrong = ((used < 0) | (used >= num_pages)) & needed
    if wrong.any():
        row = int(wrong.any(1).argmax())
        raise ValueError(
            f"block_tables[{row}] must hold pages of the pool, which has {num_pages}, got "
            f"{used[row, int(wrong[row].argmax())]}; list first the pages of the row's {lens[row]} tokens"
        )
    held = np.clip(lens[:, None] - at * size, 0, size)
    written = needed & (at >= (lens // size)[:, None]) & (room > 0)[:, None]
    _check_written(used, needed, written, held, num_pages)
    whose = 1 + held + (size + 1) * np.where(room > 0, np.arange(lens.size) + 1, 0)[:, None]
    named: IntArray = np.where(held == size, used, whose * num_pages + used)
    return named


def _check_written(
    used: IntArray, needed: BoolArray, written: BoolArray, held: IntArray, num_pages: int
) -> None:
    """Raise if two rows write to a page, or one writes where another has tokens."""
    pages = used[written]
    if not pages.size:
        return
    writers, most = np.bincount(pages, minlength=num_pages), np.zeros(num_pages, np.int64)
    np.maximum.at(most, used[needed], held[needed])
    wrong = (writers[pages] > 1) | (most[pages] > held[written])
    if wrong.any():
        page = pages[wrong][0]
        rows = (needed & (used == page)).any(1).nonzero()[0].tolist()
        raise ValueError(
            f"block_tables must give new tokens places that no other row has, got page {page} in the rows "
            f"{rows}; copy it for all but one of them before"
        )

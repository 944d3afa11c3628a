"""Block tables as inference engines keep them: the same attention as over each row's own tokens."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hydragen

HEADS, KV_HEADS, DIM = 4, 2, 16


def pool(pages: int, size: int) -> Tensor:
    """[pages, 2, page_size, KV_HEADS, DIM], as FlashInfer keeps it."""
    return torch.randn(pages, 2, size, KV_HEADS, DIM, generator=torch.Generator().manual_seed(0))


def dense(q: Tensor, pool: Tensor, tables: Any, lens: list[int]) -> Tensor:
    """Softmax attention of the last queries, row by row, in float64."""
    outs = []
    for row, (table, length) in enumerate(zip(tables, lens, strict=True)):
        tokens = pool[torch.as_tensor(table, dtype=torch.int64)].transpose(0, 1).flatten(1, 2)[:, :length]
        k, v = tokens.double().repeat_interleave(HEADS // KV_HEADS, 2).transpose(1, 2)
        logits = q[row].double().transpose(0, 1) @ k.transpose(1, 2) * DIM**-0.5
        hidden = torch.ones(q.shape[1], length).triu(length - q.shape[1] + 1).bool()
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        outs.append((weights @ v).nan_to_num(0.0).transpose(0, 1))
    return torch.stack(outs).float()


def random_rows(rng: np.random.Generator, size: int, room: int) -> tuple[list[list[int]], list[int], int]:
    """Rows of a batch that share leading full pages: tables, lengths, and pages in the pool."""
    free, tables, lens = iter(rng.permutation(400).tolist()), [], []
    for _ in range(rng.integers(1, 12)):
        table: list[int] = []
        if tables and rng.random() < 0.8:  # goes on from a row's full pages
            at = int(rng.integers(len(tables)))
            table = tables[at][: rng.integers(0, lens[at] // size + 1)]
        length = len(table) * size + int(rng.integers(0, 3 * size))
        table = [*table, *(next(free) for _ in range(-(-(length + room) // size) - len(table)))]
        tables.append(table)
        lens.append(length)
    return tables, lens, 400


@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("seed", range(12))
def test_rows_attend_to_their_own_tokens(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables, lens, pages = random_rows(rng, size, room=0)
    kv = pool(pages, size)
    padded = np.full((len(tables), max(map(len, tables)) + 1), -1 if seed % 2 else 0)
    for row, table in enumerate(tables):
        padded[row, : len(table)] = table
    tree, paged = hydragen.from_block_tables(kv[:, 0], kv[:, 1], torch.from_numpy(padded), lens)
    assert tree.path_lens.tolist() == lens
    q = torch.randn(len(tables), 1, HEADS, DIM)
    torch.testing.assert_close(hydragen.attention(q, paged, tree=tree), dense(q, kv, tables, lens))
    full = [page for table, length in zip(tables, lens, strict=True) for page in table[: length // size]]
    # what is shared once, and each row's last page
    assert len(list(paged.page_indices)) <= len(set(full)) + len(tables)


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("seed", range(6))
def test_decode_steps_of_an_engine(size: int, seed: int) -> None:
    """Speculative steps: of q_len new tokens some are taken; each step has the engine's tables anew."""
    rng, q_len = np.random.default_rng(seed), 3
    tables, lens, pages = random_rows(rng, size, room=q_len)
    kv, rows = pool(pages, size), len(tables)
    kv = torch.cat([kv, torch.full_like(kv, torch.nan)])  # pages that nobody has had yet
    more = iter(range(pages, 2 * pages))
    plan: hydragen.Plan | None = None
    for _ in range(4):
        for table, length in zip(tables, lens, strict=True):
            table += [next(more) for _ in range(-(-(length + q_len) // size) - len(table))]
        tree, paged = hydragen.from_block_tables(kv[:, 0], kv[:, 1], tables, lens, new_tokens=q_len)
        held = torch.from_numpy(tree.kv_lens.copy())
        if plan is None:
            plan = hydragen.plan(tree, paged, num_q_heads=HEADS, q_len=q_len, kv_lens=held, reserve=8.0)
        else:
            plan.update(held, tree=tree, kv=paged)
        held[tree.row_to_node.tolist()] += q_len
        plan.update(held, validate=True)
        new = torch.randn(2, rows, q_len, KV_HEADS, DIM)
        plan.append((kv[:, 0], kv[:, 1]), new[0], new[1])
        q = torch.randn(rows, q_len, HEADS, DIM)
        now = [length + q_len for length in lens]
        expected = dense(q, kv, tables, now)
        torch.testing.assert_close(plan.run(q, (kv[:, 0], kv[:, 1]), causal=True), expected)
        lens = [length + int(rng.integers(1, q_len + 1)) for length in lens]


def test_pages_that_are_not_full_are_shared_by_rows_that_fill_them_alike() -> None:
    k, v = pool(9, 4).unbind(1)
    tree, kv = hydragen.from_block_tables(k, v, [[1, 2], [1, 2], [1, 2], [1, 2, 3]], [6, 6, 7, 9])
    assert tree.parents.tolist() == [-1, 0, 0, 0]
    assert tree.row_to_node.tolist() == [1, 1, 2, 3]
    assert tree.kv_lens.tolist() == [4, 2, 3, 5]
    assert list(kv.page_indices) == [1, 2, 2, 2, 3]
    split, _ = hydragen.from_block_tables(k, v, [[1, 2], [1, 3]], [8, 8], min_shared=2)
    assert split.parents.tolist() == [-1, -1]
    alone, _ = hydragen.from_block_tables(k, v, [[1, 2], [1, 2]], [8, 8], new_tokens=0, min_shared=3)
    assert (alone.num_nodes, alone.kv_lens.sum()) == (1, 8)  # the same rows still end at one node
    apart, kv = hydragen.from_block_tables(k, v, [[1, 2, 5], [1, 2, 6]], [8, 8], new_tokens=1)
    assert apart.kv_lens.tolist() == [8, 0, 0]
    assert list(kv.page_indices) == [1, 2, 5, 6]
    none, _ = hydragen.from_block_tables(k, v, [], [])
    assert (none.num_nodes, none.num_rows) == (0, 0)
    empty, _ = hydragen.from_block_tables(k, v, [[], [3]], [0, 1])
    assert empty.path_lens.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seq_lens": [6]}, "seq_lens must hold a number for each of the 2 rows of block_tables, got 1"),
        ({"seq_lens": [6, -1]}, "seq_lens must hold numbers from 0 to .*, got -1 for row 1"),
        ({"seq_lens": [6, 2**63 - 1]}, "seq_lens must hold"),
        ({"seq_lens": [6, 9]}, r"block_tables\[1\] must list 3 pages for 9 tokens, got 2"),
        ({"new_tokens": 3}, r"block_tables\[0\] must list 3 pages for 6 tokens and 3 new ones, got 2"),
        (
            {"block_tables": [[1, 2], [1, 9]]},
            r"block_tables\[1\] must hold pages of the pool, which has 9, got 9",
        ),
        ({"block_tables": [[1, 2], [-1, 2]]}, r"block_tables\[1\] must hold pages of the pool"),
        ({"block_tables": [[1, 2], [1.5, 2]]}, r"block_tables\[1\] must hold integers"),
        (
            {"block_tables": np.array([[1, 2], [1, 9]])},
            r"block_tables\[1\] must hold pages .*, got 9; list",
        ),
        ({"block_tables": torch.tensor([[1], [1]])}, r"block_tables\[0\] must list 2 pages for 6 tokens"),
        ({"block_tables": torch.ones(2, 2)}, "block_tables must hold integers"),
        (
            {"block_tables": torch.ones(2, 2, device="meta")},
            r"must be .* a dense CPU tensor .* on meta; pass",
        ),
        (
            {"block_tables": [[1, 2], [1, 2]], "seq_lens": [6, 6], "new_tokens": 1},
            r"new tokens places that no other row has, got page 2 in the rows \[0, 1\]; copy it",
        ),
        (
            {"block_tables": [[1, 2], [2, 3]], "seq_lens": [6, 6], "new_tokens": 1},
            r"got page 2 in the rows \[0, 1\]",
        ),
        ({"block_tables": [[1, 2, 2]], "seq_lens": [6], "new_tokens": 5}, r"got page 2 in the rows \[0\]"),
        (
            {"block_tables": [[1, 2], [1, 2]], "seq_lens": [4, 4], "new_tokens": 1},
            r"page 2 in the rows \[0, 1\]",
        ),
        ({"block_tables": torch.ones(2, 2).long().to_sparse()}, r"a dense CPU tensor .*torch.sparse_coo"),
        ({"block_tables": torch.ones(2).long()}, r"block_tables must be \[num_rows, .* got shape \[2\]"),
        ({"block_tables": [1, 2]}, "a list of page numbers for each row, got the number 1"),
        ({"block_tables": 3}, "block_tables must be a list of lists of page numbers"),
        ({"new_tokens": -1}, "new_tokens must hold numbers from 0 to .*, got -1 for row 0"),
        ({"new_tokens": 1.0}, "new_tokens must"),
        ({"new_tokens": [1]}, "new_tokens must hold a number for each of the 2 rows"),
        ({"min_shared": 0}, "min_shared must be an integer of at least 1"),
        ({"k_cache": torch.zeros(9, 2, 4, 2, 16)}, r"k_cache must be \[num_pages, .* views, .* pool\[:, 0\]"),
        ({"k_cache": None}, "k_cache must be a torch.Tensor, got None"),
        ({"v_cache": None}, "v_cache must be a torch.Tensor, got None"),
        ({"v_cache": torch.zeros(8, 4, 2, 16)}, "must have the same num_pages, page_size and num_kv_heads"),
    ],
)
def test_wrong_tables(changes: dict[str, Any], match: str) -> None:
    k, v = pool(9, 4).unbind(1)
    given = {"k_cache": k, "v_cache": v, "block_tables": [[1, 2], [1, 3]], "seq_lens": [6, 8]} | changes
    with pytest.raises((TypeError, ValueError), match=match):
        hydragen.from_block_tables(**given)


def test_what_holds_keys_and_values_is_shown_by_shapes() -> None:
    k, v = pool(9, 4).unbind(1)
    _, kv = hydragen.from_block_tables(k, v, [[1, 2]], [6])
    assert repr(kv) == (
        "PagedKV(k_cache=float32 [9, 4, 2, 16] on cpu, v_cache=float32 [9, 4, 2, 16] on cpu, "
        "page_indptr=2 integers, page_indices=2 integers)"
    )


def test_rows_that_have_finished_need_no_room() -> None:
    """As engines fill a batch up, with page 0; and two whose last page another row goes on in."""
    k, v = pool(9, 4).unbind(1)
    tables, lens = [[1, 2], [0, 0], [0, 0], [1, 2], [1, 2], [1]], [6, 0, 0, 6, 6, 4]
    tree, kv = hydragen.from_block_tables(k, v, tables, lens, new_tokens=[1, 0, 0, 0, 0, 0])
    assert tree.path_lens.tolist() == lens
    plan = hydragen.plan(tree, kv, num_q_heads=HEADS, kv_lens=torch.tensor(tree.kv_lens))
    grown = tree.kv_lens.copy()
    grown[tree.row_to_node[0]] += 1
    plan.update(torch.tensor(grown), validate=True)
    new, before = torch.randn(2, 6, 1, KV_HEADS, DIM), k.clone()
    plan.append((k, v), new[0], new[1])
    before[2, 2] = new[0, 0, 0]
    assert torch.equal(k, before)
    q = torch.randn(6, 1, HEADS, DIM)
    expected = dense(q, torch.stack([k, v], 1), tables, [7, *lens[1:]])
    torch.testing.assert_close(plan.run(q, (k, v)), expected)
    with pytest.raises(ValueError, match="new tokens places that no other row has, got page 2"):
        hydragen.from_block_tables(k, v, tables[:4], [6, 0, 0, 7], new_tokens=[1, 0, 0, 0])

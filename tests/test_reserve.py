"""Plans with room for other trees: messages advise what does, lists are lengths, finished rows no trouble."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from steps import normal

import hydragen
from hydragen import PagedKV, PrefixTree

PAGE, HEADS, KV_HEADS, DIM = 4, 4, 2, 8


def paged(tree: PrefixTree, pages: Sequence[int]) -> PagedKV:
    """So many pages for each node, one after the other."""
    pool = normal(2, 64, PAGE, KV_HEADS, DIM)
    return PagedKV(pool[0], pool[1], [0, *np.cumsum(pages).tolist()], range(sum(pages)))


def planned(reserve: float, pages: int = 2) -> Any:
    tree = PrefixTree.from_levels([[8], [8] * 4])
    kv = paged(tree, [pages] * 5)
    lens = torch.tensor([8, 1, 1, 1, 1])
    return tree, kv, hydragen.plan(tree, kv, num_q_heads=HEADS, kv_lens=lens, reserve=reserve)


def test_the_reserve_that_a_message_names_is_enough() -> None:
    chain = PrefixTree.from_parents([-1, 0, 1, 2, 3, 4, *[5] * 4], row_to_node=[6, 7, 8, 9])
    kv, lens = paged(chain, [1] * 10), torch.tensor([4] * 10)
    _, _, plan = planned(1.5)
    with pytest.raises(ValueError, match=r"got .*partial results.*pairs of node.*plan with reserve=") as said:
        plan.update(lens, tree=chain, kv=kv)
    enough = float(re.findall(r"reserve=([\d.]+)", str(said.value))[0])
    planned(enough)[2].update(lens, tree=chain, kv=kv)
    with pytest.raises(ValueError, match="must fit the plan"):
        planned(0.9 * enough)[2].update(lens, tree=chain, kv=kv)


def test_so_is_the_one_for_page_tables() -> None:
    tree, _, plan = planned(1.2)
    kv, lens = paged(tree, [8] * 5), torch.tensor([8, 1, 1, 1, 1])
    with pytest.raises(
        ValueError, match=r"got 40 page numbers where it has room for 12; plan with reserve=4.0"
    ):
        plan.update(lens, tree=tree, kv=kv)
    planned(4.0)[2].update(lens, tree=tree, kv=kv)


def test_and_the_one_for_both_at_once() -> None:
    """From one page to many, and to a deeper tree: followed once, the advice is enough."""
    one = PrefixTree.from_parents([-1])
    kv, lens = paged(one, [1]), torch.tensor([4])
    deep = PrefixTree.from_parents([-1, 0, 1, 2], row_to_node=[3])
    more, then = paged(deep, [3, 2, 4, 1]), torch.tensor([12, 8, 16, 4])
    with pytest.raises(ValueError, match="page numbers") as said:
        hydragen.plan(one, kv, num_q_heads=HEADS, kv_lens=lens, reserve=1.01).update(then, tree=deep, kv=more)
    enough = float(re.findall(r"reserve=([\d.]+)", str(said.value))[0])
    hydragen.plan(one, kv, num_q_heads=HEADS, kv_lens=lens, reserve=enough).update(then, tree=deep, kv=more)


@pytest.mark.parametrize("with_tree", [True, False])
def test_lengths_in_a_list_fix_nothing(with_tree: bool) -> None:
    """In a plan whose lengths are tensors: they may grow again afterwards."""
    tree, kv, plan = planned(2.0)
    plan.update([8, 2, 1, 3, 1], **({"tree": tree, "kv": kv} if with_tree else {}))
    q, pair = normal(4, 1, HEADS, DIM), (kv.k_cache, kv.v_cache)
    for lens in ([8, 2, 1, 3, 1], [8, 7, 8, 4, 1]):
        plan.update(torch.tensor(lens))
        expected = hydragen.attention(q, kv, tree=tree, kv_lens=lens)
        torch.testing.assert_close(plan.run(q, pair), expected)


@pytest.mark.parametrize("as_list", [0, 1])
def test_each_level_stays_as_it_was_planned(as_list: int) -> None:
    """Lengths that were a list stay fixed, those of a tensor grow, whatever an update brings them in."""
    tree = PrefixTree.from_levels([[8], [8] * 4])
    kv = [(normal(nodes, 8, KV_HEADS, DIM, seed=seed),) * 2 for seed, nodes in enumerate((1, 4))]
    lens: list[Any] = [torch.tensor([2]), torch.tensor([1, 2, 3, 4])]
    plan = hydragen.plan(tree, kv, num_q_heads=HEADS, kv_lens=lens, reserve=2.0)
    mixed = [x.tolist() if at == as_list else x for at, x in enumerate(lens)]
    plan.update(mixed, tree=tree, kv=kv)
    plan.update([torch.tensor([5]), torch.tensor([5, 6, 7, 8])])
    q = normal(4, 1, HEADS, DIM)
    expected = hydragen.attention(q, kv, tree=tree, kv_lens=[[5], [5, 6, 7, 8]])
    torch.testing.assert_close(plan.run(q, kv), expected)
    fixed = hydragen.plan(tree, kv, num_q_heads=HEADS, kv_lens=[[2], lens[1]], reserve=1.5)
    for own in (lens[1], lens[1].tolist()):
        fixed.update([[2], own], tree=tree, kv=kv)
        assert fixed._work.kv_lens.tolist() == [2, 8, 8, 8, 8]


def test_levels_too() -> None:
    tree = PrefixTree.from_levels([[8], [8] * 4])
    kv = [(normal(nodes, 8, KV_HEADS, DIM, seed=seed),) * 2 for seed, nodes in enumerate((1, 4))]
    lens: list[Any] = [None, torch.ones(4, dtype=torch.int64)]
    plan = hydragen.plan(tree, kv, num_q_heads=HEADS, kv_lens=lens, reserve=2.0)
    plan.update([None, [1, 2, 3, 4]], tree=tree, kv=kv)
    plan.update([None, torch.tensor([5, 6, 7, 8])])
    q = normal(4, 1, HEADS, DIM)
    torch.testing.assert_close(
        plan.run(q, kv), hydragen.attention(q, kv, tree=tree, kv_lens=[[8], [5, 6, 7, 8]])
    )


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_rows_that_have_finished_end_at_nodes_without_pages(together: bool, first: bool) -> None:
    """One node for all of them or one each; the others are appended to."""
    _, _, plan = planned(3.0)
    parents = [-1, 0, 0, *([-1] if together else [-1, -1])]
    done = [3, 3] if together else [3, 4]
    ends = [*done, 1, 2] if first else [1, 2, *done]
    tree = PrefixTree.from_parents(parents, row_to_node=ends)
    kv = paged(tree, [2, 2, 2, *[0] * (len(parents) - 3)])
    lens = torch.tensor([8, 3, 5, *[0] * (len(parents) - 3)])
    plan.update(lens, tree=tree, kv=kv)
    lens[1:3] += 1
    plan.update(lens)
    new = normal(2, 4, 1, KV_HEADS, DIM, seed=7)
    before = kv.k_cache.clone()
    plan.append((kv.k_cache, kv.v_cache), new[0], new[1])
    rows = [ends.index(1), ends.index(2)]
    for row, (page, place) in zip(rows, ((2, 3), (5, 1)), strict=True):
        assert torch.equal(kv.k_cache[page, place], new[0, row, 0])
        before[page, place] = kv.k_cache[page, place]
    assert torch.equal(kv.k_cache, before)
    out = plan.run(normal(4, 1, HEADS, DIM), (kv.k_cache, kv.v_cache))
    finished = [row for row in range(4) if row not in rows]
    assert not out[finished].any()


def test_a_tree_change_is_no_growth() -> None:
    tree, kv, plan = planned(2.0)
    new = normal(4, 1, KV_HEADS, DIM)
    with pytest.raises(ValueError, match="without tree or kv since the plan was made or its"):
        plan.append((kv.k_cache, kv.v_cache), new, new)
    plan.update(torch.tensor([8, 2, 2, 2, 2]), tree=tree, kv=kv)
    with pytest.raises(ValueError, match="tree and kv only where they change"):
        plan.append((kv.k_cache, kv.v_cache), new, new)


def test_nothing_is_appended_once_all_rows_have_finished() -> None:
    """Until the next tree has rows that go on."""
    tree, kv, plan = planned(3.0)
    pair, new = (kv.k_cache, kv.v_cache), normal(2, 4, 1, KV_HEADS, DIM, seed=7)
    ended = PrefixTree.from_parents([-1], row_to_node=[0] * 4)
    plan.update(torch.tensor([0]), tree=ended, kv=paged(ended, [0]))
    before = kv.k_cache.clone()
    for _ in range(2):
        plan.append(pair, new[0], new[1])
        assert torch.equal(kv.k_cache, before)
        plan.update(torch.tensor([0]))
    lens = torch.tensor([8, 1, 1, 1, 1])
    plan.update(lens, tree=tree, kv=kv)
    plan.update(lens + torch.tensor([0, 1, 1, 1, 1]))
    plan.append(pair, new[0], new[1])
    assert not torch.equal(kv.k_cache, before)
    with pytest.raises(ValueError, match="k must have shape"):
        plan.append(pair, new[0][:, :0], new[1])


def test_growth_by_more_than_a_call_can_write() -> None:
    _, kv, plan = planned(2.0)
    pair, new = (kv.k_cache, kv.v_cache), normal(2, 4, 1, KV_HEADS, DIM, seed=7)
    plan.update(torch.tensor([8, 1, 1, 3, 1]))
    with pytest.raises(
        ValueError, match="at most the plan's q_len, 1, in the last update, got row 2 grown by 2"
    ):
        plan.append(pair, new[0], new[1])
    plan.update(torch.tensor([8, 1, 1, 4, 1]))
    plan.append(pair, new[0], new[1])


def test_pages_that_change_between_growing_and_appending() -> None:
    tree = PrefixTree.from_parents([-1])
    pool, new = torch.zeros(2, 4, PAGE, KV_HEADS, DIM), torch.ones(1, 1, KV_HEADS, DIM)
    kv = PagedKV(pool[0], pool[1], [0, 1], [0])
    plan = hydragen.plan(tree, kv, num_q_heads=HEADS, kv_lens=torch.tensor([1]))
    plan.update(torch.tensor([2]))
    plan.append((pool[0], pool[1]), 0 * new, 0 * new)  # from here on places are computed at every update
    plan.update(torch.tensor([3]))
    plan.update(page_indices=[2])
    plan.append((pool[0], pool[1]), new, new)
    assert pool.sum((3, 4)).nonzero().tolist() == [[0, 2, 2], [1, 2, 2]]


def test_what_counts_as_growth() -> None:
    tree, kv, plan = planned(3.0)
    pair, new = (kv.k_cache, kv.v_cache), normal(2, 4, 1, KV_HEADS, DIM, seed=7)
    plan.update(torch.tensor([8, 2, 2, 2, 2]))
    plan.append(pair, new[0], new[1])
    again = torch.tensor([8, 2, 2, 2, 2])
    plan.update(again, tree=tree, kv=kv)
    with pytest.raises(ValueError, match="append needs an update of kv_lens without tree or kv"):
        plan.append(pair, new[0], new[1])  # what grew before the tree changed is not new any more
    plan.update(torch.tensor([8, 7, 7, 7, 7]))
    before = kv.k_cache.clone()
    plan.update(torch.tensor([8, 1, 1, 1, 1]))  # tokens are taken back, as many as one likes
    plan.append(pair, new[0], new[1])
    assert torch.equal(kv.k_cache, before)


def test_rows_at_empty_nodes_with_room_have_not_finished() -> None:
    tree, kv, plan = planned(3.0)
    pair, new = (kv.k_cache, kv.v_cache), normal(2, 4, 1, KV_HEADS, DIM, seed=7)
    plan.update(torch.tensor([8, 0, 0, 0, 0]), tree=tree, kv=kv)
    with pytest.raises(ValueError, match="append needs an update of kv_lens without tree or kv"):
        plan.append(pair, new[0], new[1])

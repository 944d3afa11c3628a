"""Plan once, run for every layer, update in place: equal to attention() at every step."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from pages import paged
from steps import (
    BATCH,
    DIM,
    HEADS,
    KV_HEADS,
    PREFIX,
    ROOM,
    TREE,
    Pair,
    close,
    layer,
    normal,
    queries,
    same,
    state,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import hydragen
from hydragen import PackedKV, PagedKV, PrefixTree


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 6, "causal": True, "softcap": 2.0}])
def test_every_layer_and_every_step(backend: str, device: torch.device, options: dict[str, Any]) -> None:
    layers = [layer(seed, device) for seed in range(2)]
    lens = torch.zeros(BATCH, dtype=torch.int32, device=device)
    q_len = 2 if options else 1
    plan = hydragen.plan(
        TREE, layers[0], num_q_heads=HEADS, q_len=q_len, kv_lens=[None, lens], backend=backend
    )
    for step in range(3):
        lens += torch.arange(BATCH, device=device).clamp(max=3)  # one of them never grows
        plan.update(kv_lens=[None, lens])
        for kv in layers:
            q = queries(q_len, seed=step, device=device)
            expected = hydragen.attention(
                q, kv, tree=TREE, kv_lens=[None, lens], return_lse=True, backend=backend, **options
            )
            # the reference's matrix products are of other sizes where a length is not known beforehand
            compare = same if backend == "triton" else close
            compare(plan.run(q, kv, return_lse=True, **options), expected)


def test_without_an_update_nothing_changes(backend: str, device: torch.device) -> None:
    """A plan keeps its own lengths and page numbers: those of the caller may change at any time."""
    kv, lens = layer(0, device), torch.full((BATCH,), 4, dtype=torch.int32, device=device)
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, kv_lens=[None, lens], backend=backend)
    q = queries(device=device)
    before = plan.run(q, kv, return_lse=True)
    lens.fill_(1)
    same(plan.run(q, kv, return_lse=True), before)
    plan.update(kv_lens=[None, lens])
    assert not torch.equal(state(plan.run(q, kv, return_lse=True)).lse, state(before).lse)


def test_lengths_are_clamped_to_the_capacity(backend: str, device: torch.device) -> None:
    kv = layer(0, device)
    lens = torch.tensor([ROOM + 1000, -5, 3, 0, ROOM], device=device)
    if device.type == "cpu":  # where looking costs nothing
        with pytest.raises(ValueError, match=r"kv_lens\[1\] must not be negative"):
            hydragen.plan(TREE, kv, num_q_heads=HEADS, kv_lens=[None, lens], backend=backend)
        return
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, kv_lens=[None, lens], backend=backend)
    q = queries(device=device)
    right = torch.tensor([ROOM, 0, 3, 0, ROOM], device=device)
    expected = hydragen.attention(q, kv, tree=TREE, kv_lens=[None, right], return_lse=True, backend=backend)
    same(plan.run(q, kv, return_lse=True), expected)


@pytest.mark.parametrize("page_size", [4, 64])
def test_pages(page_size: int, backend: str, device: torch.device) -> None:
    lens = [PREFIX, *[ROOM] * BATCH]
    k, v = normal(2, sum(lens), KV_HEADS, DIM, device=device)
    kv, moved = (paged(k, v, lens, page_size, seed=seed) for seed in (0, 1))
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, kv_lens=lens, backend=backend)
    q = queries(device=device)
    offsets = torch.tensor([0, *lens]).cumsum(0)
    expected = hydragen.attention(q, PackedKV(k, v, offsets), tree=TREE, return_lse=True, backend=backend)
    same(plan.run(q, kv, return_lse=True), expected)
    same(plan.run(q, (kv.k_cache, kv.v_cache), return_lse=True), expected)
    plan.update(page_indices=moved.page_indices)
    same(plan.run(q, (moved.k_cache, moved.v_cache), return_lse=True), expected)
    same(plan.run(q, moved, return_lse=True), expected)
    with pytest.raises(ValueError, match=r"kv\.page_indices must be what the plan was made for"):
        plan.run(q, kv)


def packed_layout(tree: PrefixTree, seed: int, device: torch.device) -> PackedKV:
    assert tree.kv_lens is not None
    k, v = normal(2, int(tree.kv_lens.sum()), KV_HEADS, DIM, seed=seed, device=device)
    return PackedKV(k, v, tree.kv_offsets.copy())


TREES = {
    "other lengths": PrefixTree.from_levels([[30], [1, 2, 3, 4, 5]]),
    "deeper": PrefixTree.from_parents([-1, 0, 0, 1, 1], [17, 5, 3, 2, 0], row_to_node=[3, 4, 2, 2, 0]),
    "nothing shared": PrefixTree.from_parents([-1] * 5, [4, 5, 6, 7, 0]),
    "several roots": PrefixTree.from_parents([-1, -1, 1, 0], [9, 40, 2, 1], row_to_node=[2, 0, 3, 3, 1]),
    "all at one node": PrefixTree.from_parents([-1], [50], row_to_node=[0] * 5),
}


@pytest.mark.parametrize(("q_len", "options"), [(1, {}), (2, {"causal": True, "window": 8})])
def test_the_tree_may_change_within_the_reserve(
    q_len: int, options: dict[str, Any], backend: str, device: torch.device
) -> None:
    kv = packed_layout(TREE, 0, device)
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, q_len=q_len, backend=backend, reserve=3.0)
    for seed, tree in enumerate(TREES.values()):
        other = packed_layout(tree, seed, device)
        plan.update(tree=tree, kv=other)
        assert plan.tree is tree
        q = queries(q_len, seed, device)
        expected = hydragen.attention(q, other, tree=tree, return_lse=True, backend=backend, **options)
        close(plan.run(q, other, return_lse=True, **options), expected)


def test_a_tree_may_change_together_with_pages(backend: str, device: torch.device) -> None:
    kv = paged(*normal(2, PREFIX + ROOM * BATCH, KV_HEADS, DIM, device=device), [PREFIX, *[ROOM] * BATCH], 4)
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, backend=backend, reserve=2.0)
    tree = TREES["deeper"]
    assert tree.kv_lens is not None
    lens = tree.kv_lens.tolist()
    other = paged(*normal(2, sum(lens), KV_HEADS, DIM, seed=1, device=device), lens, 4, seed=1)
    pool = PagedKV(
        torch.cat([other.k_cache, kv.k_cache])[: kv.k_cache.shape[0]],
        torch.cat([other.v_cache, kv.v_cache])[: kv.v_cache.shape[0]],
        other.page_indptr,
        other.page_indices,
    )
    plan.update(lens, tree=tree, kv=pool)
    q = queries(device=device)
    expected = hydragen.attention(q, pool, tree=tree, kv_lens=lens, return_lse=True, backend=backend)
    close(plan.run(q, pool, return_lse=True), expected)


def test_what_does_not_fit_the_reserve_changes_nothing(backend: str, device: torch.device) -> None:
    kv = packed_layout(TREE, 0, device)
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, backend=backend, reserve=1.5)
    q = queries(device=device)
    before = plan.run(q, kv, return_lse=True)
    deep = PrefixTree.from_parents([-1, *range(59)], [3] * 60, row_to_node=[59] * 5)
    with pytest.raises(ValueError, match=r"tree must fit the plan's capacity.*reserve"):
        plan.update(tree=deep, kv=packed_layout(deep, 1, device))
    same(plan.run(q, kv, return_lse=True), before)
    assert plan.tree is TREE


def test_packed_queries(backend: str, device: torch.device) -> None:
    kv = packed_layout(TREE, 0, device)
    offsets = [0, 2, 2, 3, 6, 7]
    q = normal(7, HEADS, DIM, device=device)
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, cu_seqlens_q=offsets, backend=backend)
    expected = hydragen.attention(
        q, kv, tree=TREE, cu_seqlens_q=offsets, causal=True, return_lse=True, backend=backend
    )
    same(plan.run(q, kv, causal=True, return_lse=True), expected)


@pytest.mark.gpu
@pytest.mark.triton
def test_offsets_on_the_device() -> None:
    device = torch.device("cuda")
    kv, total = packed_layout(TREE, 0, device), 7
    q = normal(total, HEADS, DIM, device=device)
    first, second = (torch.tensor(cu, device=device) for cu in ([0, 2, 2, 3, 6, 7], [0, 0, 3, 4, 5, 7]))
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, cu_seqlens_q=first, max_seqlen_q=3, total_q=total)
    for offsets in (first, second):
        plan.update(cu_seqlens_q=offsets)
        expected = hydragen.attention(
            q, kv, tree=TREE, cu_seqlens_q=offsets, max_seqlen_q=3, causal=True, return_lse=True
        )
        same(plan.run(q, kv, causal=True, return_lse=True), expected)


def test_batch_invariant_plans(backend: str, device: torch.device) -> None:
    kv, q = layer(0, device), queries(device=device)
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, backend=backend, batch_invariant=True)
    expected = hydragen.attention(q, kv, tree=TREE, return_lse=True, backend=backend, batch_invariant=True)
    same(plan.run(q, kv, return_lse=True), expected)


def test_compiled_without_recompilation() -> None:
    kv = layer(0, torch.device("cpu"))
    lens = torch.full((BATCH,), 2)
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, kv_lens=[None, lens])
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(q: Tensor, kv: list[Pair]) -> Tensor:
        out = plan.run(q * 2, kv, causal=True)
        assert isinstance(out, Tensor)
        return out + 1

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for length in (3, 5, 9):
        plan.update(kv_lens=[None, torch.full((BATCH,), length)])
        q = queries(seed=length)
        assert torch.equal(compiled(q, kv), step(q, kv))
    assert counter.frame_count == 1


def test_explain_says_what_the_plan_does() -> None:
    tree = PrefixTree.from_levels([[512], [16] * 64])
    k, v = torch.zeros(2, int(tree.kv_lens.sum()), 2, 64, dtype=torch.bfloat16)
    plan = hydragen.plan(tree, PackedKV(k, v, tree.kv_offsets), num_q_heads=8)
    explanation = plan.explain()
    assert explanation.bytes == (512 + 64 * 16) * 2 * 128 * 2
    assert explanation.bytes_unshared == 64 * (512 + 16) * 2 * 128 * 2
    assert [cost.count for cost in explanation.segments] == [1, 64]
    assert "6 nodes" in repr(hydragen.plan(TREE, packed_layout(TREE, 0, torch.device("cpu")), num_q_heads=4))


def test_new_pages_outlast_a_new_tree() -> None:
    k, v = normal(2, 6, 4, KV_HEADS, DIM)
    trees = [PrefixTree.from_parents([-1, 0, 0], row_to_node=rows) for rows in ([1, 2], [2, 0])]
    plan = hydragen.plan(trees[0], PagedKV(k, v, [0, 1, 2, 3], [0, 1, 2]), num_q_heads=HEADS, reserve=2.0)
    plan.update(page_indices=[3, 4, 5])
    plan.update(tree=trees[1])
    moved = PagedKV(k, v, [0, 1, 2, 3], [3, 4, 5])
    q = queries()[:2]
    torch.testing.assert_close(plan.run(q, (k, v)), hydragen.attention(q, moved, tree=trees[1]))


def test_a_plan_keeps_no_keys_and_values_alive() -> None:
    kv = packed_layout(TREE, 0, torch.device("cpu"))
    gone = [weakref.ref(kv.k), weakref.ref(kv.v)]
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, reserve=2.0)
    plan.update(kv=kv)
    plan.run(queries(), kv)
    del kv
    gc.collect()
    assert [one() for one in gone] == [None, None]
    assert plan.tree is TREE


def test_packed_levels_with_other_offsets_are_refused() -> None:
    k, v = normal(2, BATCH * ROOM, KV_HEADS, DIM)
    prefix = layer(0, torch.device("cpu"))[0]
    offsets = list(range(0, BATCH * ROOM + 1, ROOM))
    other = [0, 1, *offsets[2:]]
    plan = hydragen.plan(TREE, [prefix, PackedKV(k, v, offsets)], num_q_heads=HEADS)
    q = queries()
    expected = hydragen.attention(q, [prefix, PackedKV(k, v, offsets)], tree=TREE)
    for same_offsets in (offsets, list(offsets), torch.tensor(offsets)):
        found = plan.run(q, [prefix, PackedKV(k, v, same_offsets)])
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"kv\[1\]\.cu_seqlens_k must be what the plan was made for"):
        plan.run(q, [prefix, PackedKV(k, v, other)])
    with pytest.raises(ValueError, match=r"kv\[0\] must be padded, as the plan was made for"):
        plan.run(q, [PackedKV(prefix[0][0], prefix[1][0], [0, PREFIX]), (k, v)])
    # all nodes in one tensor are no level, whatever their offsets
    with pytest.raises(ValueError, match="kv must be as the plan was made for, a list of levels"):
        plan.run(q, PackedKV(k, v, offsets))


def test_a_table_of_the_caller_may_change_in_place(device: torch.device) -> None:
    """Also when the tree changes: the plan then begins with page numbers of its own."""
    k, v = normal(2, 6, 4, KV_HEADS, DIM, device=device)
    trees = [PrefixTree.from_parents([-1, 0, 0], row_to_node=rows) for rows in ([1, 2], [2, 0])]
    table = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    plan = hydragen.plan(trees[0], PagedKV(k, v, [0, 1, 2, 3], table), num_q_heads=HEADS, reserve=2.0)
    table.fill_(5)
    plan.update(tree=trees[1])
    q, right = queries(device=device)[:2], PagedKV(k, v, [0, 1, 2, 3], [0, 1, 2])
    torch.testing.assert_close(plan.run(q, (k, v)), hydragen.attention(q, right, tree=trees[1]))


def test_a_table_changed_in_place_is_another_one() -> None:
    """The plan keeps what the table was; a run that names the changed one is refused, equal ones are not."""
    k, v = normal(2, 6, 4, KV_HEADS, DIM)
    tree = PrefixTree.from_parents([-1, 0], row_to_node=[1])
    q = queries()[:1]
    for table in ([0, 1], np.array([0, 1]), torch.tensor([0, 1])):
        kv = PagedKV(k, v, [0, 1, 2], table)
        plan = hydragen.plan(tree, kv, num_q_heads=HEADS)
        torch.testing.assert_close(plan.run(q, kv), plan.run(q, (k, v)))
        table[0] = 5
        with pytest.raises(ValueError, match=r"kv\.page_indices must be what the plan was made for"):
            plan.run(q, kv)
        plan.update(page_indices=table)
        torch.testing.assert_close(plan.run(q, kv), hydragen.attention(q, kv, tree=tree))


def test_many_trees_leave_nothing_behind(backend: str, device: torch.device) -> None:
    """Nodes of a level numbered here and there, levels of ever other strides: memory stays bounded."""
    rng = np.random.default_rng(0)
    first = PrefixTree.from_parents([-1, -1, 0, 0, 1, 1, 0])
    q = normal(5, 1, 2, 8, device=device)
    plan, sizes = None, []
    for step in range(90 if backend == "reference" or device.type == "cuda" else 3):
        # roots and leaves in any order that has parents first
        roots = sorted(rng.choice(np.arange(1, 7), 1).tolist())
        parents = [-1, *[-1 if node in roots else 0 for node in range(1, 7)]]
        tree = first if plan is None else PrefixTree.from_parents(parents, row_to_node=range(2, 7))
        room = 3 + step
        kv = [tuple(normal(2, nodes, room, 2, 8, seed=step, device=device)) for nodes in (2, 5)]
        lens = [torch.full((n,), 2 + step % 2, device=device) for n in (2, 5)]
        if plan is None:
            plan = hydragen.plan(tree, kv, num_q_heads=2, kv_lens=lens, backend=backend, reserve=4.0)
        else:
            plan.update(lens, tree=tree, kv=kv)
        expected = hydragen.attention(q, kv, tree=tree, kv_lens=lens, backend=backend)
        torch.testing.assert_close(plan.run(q, kv), expected)
        sizes.append(len(plan._work.uploads) + len(plan._state._indices))
    assert max(sizes) <= 70
    assert len(plan._state._indices) == 0


def test_another_tree_needs_its_lengths_where_they_grow() -> None:
    """Or the capacities would count as lengths, and what nobody has written would be attended to."""
    kv = packed_layout(TREE, 0, torch.device("cpu"))
    lens = torch.tensor([PREFIX, *[1] * BATCH])
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, kv_lens=lens, reserve=2.0)
    together = PrefixTree.from_parents(TREE.parents, row_to_node=[1, 1, 2, 3, 4])
    with pytest.raises(ValueError, match="kv_lens must be given with kv or tree"):
        plan.update(tree=together)
    assert plan.tree is TREE

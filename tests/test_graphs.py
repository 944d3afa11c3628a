"""A decode step captured in a CUDA graph and replayed while everything grows."""

from typing import Any

import pytest
import torch
from pages import paged
from steps import LAYOUTS, normal
from torch import Tensor

import hydragen
from hydragen import PackedKV, Plan, PrefixTree

pytestmark = [pytest.mark.gpu, pytest.mark.triton]

STEPS, BATCH, PREFIX = 256, 7, 300
HEADS, KV_HEADS, DIM = 8, 2, 64
WIDTH, KV_WIDTH = HEADS * DIM, KV_HEADS * DIM
TREE = PrefixTree.from_levels([[PREFIX], [STEPS] * BATCH])
CAPACITIES = [PREFIX, *[STEPS] * BATCH]


class Model:
    """Two layers of projection, append and attention, with their keys and values."""

    def __init__(self, layout: str) -> None:
        device = torch.device("cuda")
        self.layout = layout
        self.lens = torch.tensor([PREFIX, *[0] * BATCH], device=device)
        self.weights = normal(2, WIDTH, WIDTH + 2 * KV_WIDTH, device=device) / WIDTH**0.5
        self.layers: list[Any] = []
        for seed in range(2):
            k, v = normal(2, sum(CAPACITIES), KV_HEADS, DIM, seed=seed, device=device)
            if layout == "paged":
                pool = paged(k, v, CAPACITIES, 16)
                self.table = pool if seed == 0 else self.table
                self.layers.append((pool.k_cache, pool.v_cache))
            elif layout == "packed":
                self.layers.append((k, v))
            else:
                suffixes = [x[PREFIX:].unflatten(0, (BATCH, STEPS)).clone() for x in (k, v)]
                self.layers.append([(k[None, :PREFIX], v[None, :PREFIX]), tuple(suffixes)])

    @property
    def kv_lens(self) -> Any:
        return [None, self.lens[1:]] if self.layout == "levels" else self.lens

    def plan(self) -> Plan:
        kv = self.layers[0]
        if self.layout == "paged":
            kv = self.table
        elif self.layout == "packed":
            kv = PackedKV(*kv, TREE.kv_offsets)
        return hydragen.plan(TREE, kv, num_q_heads=HEADS, kv_lens=self.kv_lens)

    def step(self, plan: Plan, x: Tensor) -> Tensor:
        self.lens[1:] += 1
        plan.update(kv_lens=self.kv_lens)
        for weight, kv in zip(self.weights, self.layers, strict=True):
            q, k, v = (x @ weight).split([WIDTH, KV_WIDTH, KV_WIDTH], -1)
            plan.append(kv, k.view(BATCH, 1, KV_HEADS, DIM), v.view(BATCH, 1, KV_HEADS, DIM))
            out = plan.run(q.view(BATCH, 1, HEADS, DIM), kv, causal=True, window=200)
            assert isinstance(out, Tensor)
            x = x + out.view(BATCH, WIDTH)
            x = x / x.norm(dim=-1, keepdim=True) * 8
        return x


@pytest.mark.parametrize("layout", LAYOUTS)
def test_256_replays_equal_256_eager_steps(layout: str) -> None:
    first = normal(BATCH, WIDTH, seed=3, device="cuda")
    eager, x = Model(layout), first.clone()
    eager_plan = eager.plan()
    expected = []
    for _ in range(STEPS):
        x = eager.step(eager_plan, x)
        expected.append(x)

    model, x = Model(layout), first.clone()
    plan = model.plan()
    model.step(plan, x)  # compiles the kernels, and makes what a plan makes at its first run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.copy_(model.step(plan, x))
    model.lens[1:] = 0
    plan.update(kv_lens=model.kv_lens)
    x.copy_(first)
    for at in range(STEPS):
        graph.replay()
        assert torch.equal(x, expected[at]), f"step {at}"


def test_a_captured_run_sees_another_tree() -> None:
    device = torch.device("cuda")
    q = normal(5, 1, HEADS, DIM, device=device)
    k, v = normal(2, 700, KV_HEADS, DIM, device=device)
    trees = [
        PrefixTree.from_levels([[400], [10, 20, 30, 40, 50]]),
        PrefixTree.from_parents([-1, 0, 0, 1, 1], [300, 50, 30, 20, 0], row_to_node=[3, 4, 2, 2, 0]),
        PrefixTree.from_parents([-1] * 5, [100, 200, 1, 7, 0]),
    ]

    def layout(tree: PrefixTree) -> PackedKV:
        assert tree.kv_lens is not None
        used = int(tree.kv_lens.sum())
        # the last node has what is left: the tensors keep their shape
        return PackedKV(k, v, [*tree.kv_offsets[:-1].tolist(), 700 if used < 700 else used])

    plan = hydragen.plan(trees[0], layout(trees[0]), num_q_heads=HEADS, reserve=3.0)
    plan.run(q, (k, v))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = plan.run(q, (k, v))
    for tree in trees[::-1]:
        plan.update(tree.kv_lens, tree=tree, kv=layout(tree))
        graph.replay()
        expected = hydragen.attention(q, layout(tree), tree=tree, kv_lens=tree.kv_lens)
        torch.testing.assert_close(out, expected)


def levels_with_room(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Two roots and three leaves."""
    made = [normal(2, nodes, 40, KV_HEADS, DIM, seed=nodes, device=device) for nodes in (2, 3)]
    return [(kv[0], kv[1]) for kv in made]


def test_a_captured_update_sees_other_node_numbers() -> None:
    """Lengths by level go to the level's nodes, wherever those are among all nodes by now."""
    device = torch.device("cuda")
    kv, q = levels_with_room(device), normal(3, 1, HEADS, DIM, device=device)
    trees = [PrefixTree.from_parents(parents) for parents in ([-1, 0, 0, -1, 3], [-1, -1, 0, 1, 0])]
    lens = [torch.tensor([30, 20], device=device), torch.tensor([1, 2, 3], device=device)]
    plan = hydragen.plan(trees[0], kv, num_q_heads=HEADS, kv_lens=lens, reserve=2.0)
    plan.update(lens)
    plan.run(q, kv)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lens[1].add_(1)
        plan.update(lens)
        out = plan.run(q, kv)
    for tree in (trees[1], trees[0], trees[1]):
        plan.update(lens, tree=tree, kv=kv)
        graph.replay()
        expected = hydragen.attention(q, kv, tree=tree, kv_lens=lens)
        torch.testing.assert_close(out, expected)


def test_a_captured_append_writes_nothing_for_rows_that_share_a_node() -> None:
    device = torch.device("cuda")
    kv, new = levels_with_room(device), normal(2, 3, 1, KV_HEADS, DIM, seed=7, device=device)
    tree = PrefixTree.from_parents([-1, -1, 0, 1, 0])
    lens = [torch.tensor([30, 20], device=device), torch.tensor([1, 2, 3], device=device)]
    plan = hydragen.plan(tree, kv, num_q_heads=HEADS, kv_lens=lens, reserve=2.0)
    plan.update(lens)
    plan.append(kv, new[0], new[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lens[1].add_(1)
        plan.update(lens)
        plan.append(kv, new[0], new[1])
    graph.replay()
    assert torch.equal(kv[1][0][torch.arange(3), lens[1] - 1], new[0][:, 0])
    shared = PrefixTree.from_parents(tree.parents, row_to_node=[2, 2, 3])
    plan.update(lens, tree=shared)
    before = [x.clone() for pair in kv for x in pair]
    graph.replay()
    for x, held in zip([x for pair in kv for x in pair], before, strict=True):
        assert torch.equal(x, held)

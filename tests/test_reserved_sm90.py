"""Plans with room for other trees on a GPU, in specialised tiles: eager, and a captured graph replayed."""

from typing import Any

import numpy as np
import pytest
import torch
from special_tiles import SM90, kernels_of
from torch import Tensor

import hydragen
from hydragen import AttentionState, PackedKV, PagedKV, PrefixTree, tuning, work
from hydragen.prefix_tiles import PREFIX_TILES
from hydragen.warp_tiles import WARP_ROWS, WARP_TILES, WarpTile

pytestmark = SM90

ROWS, HEADS, KV_HEADS = 128, 8, 2
# of a node in a first tree; capacity where lengths grow
PREFIX, OWN, PAGE = 333, 70, 16


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "is_small", lambda *_: False)

    def warp(*given: int, most_rows: int, **_: Any) -> WarpTile | None:
        return WARP_TILES["medium"] if most_rows <= WARP_ROWS and given[3] == 2 else None

    monkeypatch.setattr(tuning, "warp_tile_for", warp)


class Case:
    """A pool, or packed tensors, of which every tree of the test takes what its nodes need."""

    def __init__(self, layout: str, dim: int, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self.rng = np.random.default_rng(0)
        tokens = 4 * (PREFIX + 200 * (OWN + PAGE))
        shape = (tokens // PAGE, PAGE) if layout == "paged" else (tokens,)
        self.k, self.v = (
            torch.randn(*shape, KV_HEADS, dim, device=device, dtype=torch.bfloat16) for _ in range(2)
        )
        self.q = torch.randn(ROWS, 1, HEADS, dim, device=device, dtype=torch.bfloat16)

    def tree(self, number: int) -> PrefixTree:
        """First two levels of prompts and rows of their own; then trees with rows that end together."""
        if number == 0:
            parents = [-1, *[0] * 8, *(1 + row % 8 for row in range(ROWS))]
            return PrefixTree.from_parents(parents, row_to_node=range(9, 9 + ROWS))
        nodes = int(self.rng.integers(1, 150))
        parents = [int(self.rng.integers(-1, max(1, node // 2))) if node else -1 for node in range(nodes)]
        ends = self.rng.integers(0, nodes, ROWS)
        return PrefixTree.from_parents(parents, row_to_node=ends)

    def room(self, tree: PrefixTree) -> np.ndarray:
        """Capacities: the first node's is the largest."""
        return np.array([PREFIX] + [OWN] * (tree.num_nodes - 1))

    def kv(self, tree: PrefixTree) -> Any:
        room = self.room(tree)
        if self.layout == "packed":
            return PackedKV(self.k[: room.sum()], self.v[: room.sum()], [0, *np.cumsum(room).tolist()])
        indptr = np.append(0, np.cumsum(-(-room // PAGE)))
        return PagedKV(self.k, self.v, indptr, self.rng.permutation(self.k.shape[0])[: indptr[-1]])

    def pair(self, kv: Any) -> tuple[Tensor, Tensor]:
        return (kv.k, kv.v) if self.layout == "packed" else (kv.k_cache, kv.v_cache)

    def expected(self, tree: PrefixTree, kv: Any, lens: np.ndarray) -> AttentionState:
        """The same by the reference, in float64."""
        k, v = self.k.double(), self.v.double()
        exactly: Any = (
            PackedKV(k[: kv.k.shape[0]], v[: kv.k.shape[0]], kv.cu_seqlens_k)
            if self.layout == "packed"
            else PagedKV(k, v, kv.page_indptr, kv.page_indices)
        )
        found = hydragen.attention(
            self.q.double(), exactly, tree=tree, kv_lens=lens.tolist(), return_lse=True, backend="reference"
        )
        assert isinstance(found, AttentionState)
        return found


@pytest.mark.parametrize("captured", [True, False])  # compute-sanitizer cannot capture: it sees the latter
@pytest.mark.parametrize("layout", ["packed", "paged"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["wide", "wide+1", "narrow+2", "single"])
def test_other_trees(
    name: str, dim: int, layout: str, captured: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        tuning,
        "prefix_tile_for",
        lambda *given, **_: PREFIX_TILES[name] if given[3] == 2 else None,  # not for float64, which judges
    )
    case = Case(layout, dim, device)
    tree = case.tree(0)
    kv, lens = case.kv(tree), case.room(tree)
    on_device = torch.tensor(lens, device=device)
    plan = hydragen.plan(tree, kv, num_q_heads=HEADS, kv_lens=on_device, reserve=6.0)
    replayed: AttentionState | None = None
    if captured:
        plan.run(case.q, case.pair(kv), return_lse=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = plan.run(case.q, case.pair(kv), return_lse=True)
    for number in range(5):
        if number:
            tree = case.tree(number)
            kv = case.kv(tree)
            lens = case.rng.integers(0, case.room(tree) + 1)
            plan.update(torch.tensor(lens, device=device), tree=tree, kv=kv)
        expected = case.expected(tree, kv, lens)
        eager = plan.run(case.q, case.pair(kv), return_lse=True)
        for found, right in zip(eager, expected, strict=True):
            close(found, right)
        if replayed is not None:
            for x in replayed:
                x.fill_(torch.nan)
            graph.replay()
            close(replayed.lse, expected.lse)
            assert torch.equal(eager.out, replayed.out)
    # the launches of the one kind of call that there was, by the key of its layout
    (launches,) = [made[0] for key, made in plan._work.uploads.items() if not isinstance(key[0], str)]
    assert kernels_of(launches) == {"attend_prefix", "attend_rows"}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), atol=2e-2, rtol=2e-2)

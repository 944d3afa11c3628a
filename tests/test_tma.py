"""Tensor descriptors of the specialised tiles: they address what the kernels mean, in every layout served."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from special_tiles import backend
from test_prefix_tiles import planned

import hydragen
from hydragen import PackedKV, PagedKV, prefix_tiles, tuning
from hydragen.backends.tokens import locate
from hydragen.prefix_tiles import PREFIX_TILES, PrefixTile
from hydragen.warp_tiles import WARP_TILES

pytestmark = pytest.mark.triton

ROWS, KEYS, OWN, HEADS, DIM = 128, 300, 40, 2, 64
OFFSETS = [0, *(KEYS + OWN * np.arange(ROWS + 1)).tolist()]


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Specialised tiles for both launches, and for pages of every size."""
    monkeypatch.setattr(tuning, "prefix_tile_for", lambda *_, **__: PREFIX_TILES["narrow+2"])
    monkeypatch.setattr(tuning, "warp_tile_for", lambda *_, **__: WARP_TILES["large"])
    monkeypatch.setattr(prefix_tiles, "MEASURED_PAGES", range(1, 1000))


def draw(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).half()


def padded(interleaved: bool) -> Any:
    """Two levels with room to spare; k and v from one tensor each, or one after the other of every token."""
    if interleaved:
        both = [draw(n, keys, 2, HEADS, DIM) for n, keys in ((1, KEYS + 9), (ROWS, OWN + 5))]
        return [(x[:, :, 0], x[:, :, 1]) for x in both]
    return [(draw(n, keys, HEADS, DIM), draw(n, keys, HEADS, DIM)) for n, keys in ((1, KEYS), (ROWS, OWN))]


def paged(size: int, together: bool) -> PagedKV:
    """Scattered pages; k and v in pools of their own, or in one."""
    counts = [-(-KEYS // size), *[-(-OWN // size)] * ROWS]
    indptr = np.concatenate([[0], np.cumsum(counts)])
    table = np.random.default_rng(0).permutation(int(indptr[-1]) + 7)[: indptr[-1]].astype(np.int32)
    pools = draw(int(indptr[-1]) + 7, 2, size, HEADS, DIM)
    k, v = pools[:, 0], pools[:, 1]
    return (
        PagedKV(k, v, indptr, table) if together else PagedKV(k.contiguous(), v.contiguous(), indptr, table)
    )


CASES: dict[str, Any] = {
    "padded": (lambda: padded(interleaved=False), 0),
    "interleaved": (lambda: padded(interleaved=True), 0),
    "packed": (lambda: PackedKV(*(draw(OFFSETS[-1], HEADS, DIM) for _ in range(2)), OFFSETS), 0),
    "pages of 16": (lambda: paged(16, together=False), 16),
    "pages of 32, one pool": (lambda: paged(32, together=True), 32),
    "pages of 128": (lambda: paged(128, together=False), 128),
}

# What both kernels are told of the problem below, by their arguments' names.
COMMON = {
    "q_len": 1, "stride_qb": 4 * HEADS * DIM, "stride_qh": DIM, "GROUP_SIZE": 4, "NUM_KV_HEADS": HEADS,
    "HEAD_DIM": DIM, "HEAD_DIM_V": DIM, "GATHER_Q": False, "HAS_LENS": False, "FINAL": False,
    "HAS_SINKS": False, "HAS_LSE": False, "PDL": True, "RESERVED": False,
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_they_address_what_the_kernels_mean(name: str) -> None:
    made, size = CASES[name]
    tree = hydragen.PrefixTree.from_parents([-1, *[0] * ROWS], row_to_node=range(1, ROWS + 1))
    lens = [KEYS, *[OWN] * ROWS]
    kv = made()
    given: dict[str, Any] = {
        "tree": tree,
        "kv_lens": [[KEYS], [OWN] * ROWS] if isinstance(kv, list) else lens,
    }
    call, plan = planned(draw(ROWS, 1, 4 * HEADS, DIM), kv, **given)
    tokens, nodes = locate(plan, call, kernels_clamp=True), call.nodes
    names = ("out", "lse", "part_out", "part_lse", "sinks")
    buffers = {f"{name}_ptr": torch.zeros(1) for name in names}
    ints = {f"{name}_ptr": torch.zeros(1) for name in ("q_token", "q_pos", "kv_start", "kv_lens", "pages")}
    for index, launch in enumerate(plan.work.launches):
        launcher = backend("launches").attend_launcher(plan, call, tokens, index)
        assert isinstance(launcher, backend("tma").TmaLauncher)
        seen: list[Any] = []
        special, launcher.launcher = launcher.launcher, lambda tensors, _, into=seen: into.extend(tensors)
        items, links, count = torch.zeros(1), torch.zeros(1), torch.zeros(1)
        merge = {"merge_indptr_ptr": torch.zeros(1), "merge_indices_ptr": torch.zeros(1)}
        tensors = (call.q, nodes.k, nodes.v, *buffers.values(), items, links, *ints.values(), count)
        merges = launcher((*tensors, *merge.values()), (True,) * 9)
        pointers = dict(zip(special._kernel.arg_names, seen, strict=False))
        sent = {**buffers, **ints, **merge, "items_ptr": items, "num_items_ptr": count, "q_ptr": call.q}
        assert all(pointers[name] is sent[name] for name in pointers if name.endswith("_ptr"))
        given = dict(zip(special._kernel.arg_names[len(seen) :], special._rest, strict=True))
        prefix, tile = special._kernel is backend("tma").attend_prefix, launch.tile
        own = {"num_tasks": HEADS * len(launch.items), "CONSUMERS": 2, "Q_SHARED": True, "CAUSAL": False}
        warp = {"zero": 0, "K_STAGES": 2, "V_STAGES": 2, "MERGE": True}
        assert (own if prefix else warp).items() <= given.items()
        assert merges == (not prefix)
        assert COMMON.items() <= given.items()
        assert given["num_items"] == len(launch.items)
        assert given["num_pages"] == (nodes.k[0].shape[0] if size else 0)
        # steps of 32 keys do not fit into pages of 16
        assert given["BLOCK_N"] == (tile.prefix.block_n if prefix else 16 if size == 16 else 32)
        for side, base in enumerate((nodes.k, nodes.v)):
            slot_rows = given["kv"[side] + "_slot_rows"]
            for at, level in enumerate(given["levels"]):
                described = seen[1 + 4 * side + at]
                rows = described.base.as_strided(described.shape, described.strides)
                step = given["BLOCK_N"]
                assert described.block_shape == [min(step, size) if size and prefix else step, DIM]
                for item in launch.items[launch.items[:, 1] == level][::7]:
                    _, _, slot, begin, end = item[:5].tolist()
                    for key in (begin, (begin + end) // 2, end - 1):
                        if size:
                            page = int(nodes.pages.indices[slot + key // size])
                            row, place = page * slot_rows[at] + key % size, (page, key % size)
                        else:
                            row = slot * slot_rows[at] + key
                            place = (slot + key,) if nodes.packed[level] else (slot, key)
                        for head in range(HEADS):
                            found = rows[row, head * DIM : (head + 1) * DIM]
                            assert torch.equal(found, base[level][place][head])
        assert given["levels"] == tuple(np.unique(launch.items[:, 1]))
        assert given["PAGE_SIZE"] == size


def reserved(kv: Any, rows: int = ROWS) -> Any:
    """A checked call and its plan, other trees may follow; own levels below one prefix."""
    sizes = [(x[0].shape[0], x[0].shape[1]) for x in kv]
    tree = hydragen.PrefixTree.from_levels([[tokens] * nodes for nodes, tokens in sizes])
    call, plan = planned(draw(rows, 1, 4 * HEADS, DIM), kv, tree=tree, reserved=True)
    launches = tuple(replace(x, num_items=np.ones(1, np.int32)) for x in plan.work.launches)
    return call, replace(plan, work=replace(plan.work, launches=launches))


@pytest.mark.parametrize("empty", [True, False])
def test_a_level_without_tokens_is_for_the_plain_tile(empty: bool) -> None:
    kv = [(draw(n, keys, HEADS, DIM),) * 2 for n, keys in ((1, KEYS), (1, 0 if empty else 1), (ROWS, OWN))]
    call, plan = reserved(kv)
    launcher = backend("launches").attend_launcher(plan, call, locate(plan, call, kernels_clamp=True), 0)
    handed: list[str] = []
    launcher._plain = lambda *_: handed.append("plain")
    launcher.launcher = lambda *_: handed.append("special")
    k, v = (tuple(pair[side] for pair in kv) for side in (0, 1))
    one = torch.zeros(1)
    launcher((call.q, k, v, *[one] * 15), (True,) * 9)
    assert handed == ["plain" if empty else "special"]


@pytest.mark.parametrize("spare", [0, 8])
@pytest.mark.parametrize("other_trees", [True, False])
def test_slots_that_are_no_whole_rows(spare: int, other_trees: bool) -> None:
    """One such slot is no trouble, unless another tree may have two."""
    row = HEADS * DIM
    strides = (KEYS * row + spare, row, DIM, 1)
    first = tuple(torch.as_strided(draw(2 * strides[0]), (1, KEYS, HEADS, DIM), strides) for _ in "kv")
    kv = [first, (draw(ROWS, OWN, HEADS, DIM),) * 2]
    if other_trees:
        call, plan = reserved(kv)
    else:
        call, plan = planned(draw(ROWS, 1, 4 * HEADS, DIM), kv)
    launcher = backend("launches").attend_launcher(plan, call, locate(plan, call, kernels_clamp=True), 0)
    assert isinstance(launcher, backend("tma").TmaLauncher) == (spare == 0 or not other_trees)


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("tile", PREFIX_TILES.values(), ids=PREFIX_TILES.keys())
def test_a_box_lies_within_a_page(tile: PrefixTile, page_size: int) -> None:
    """Wherever a split begins: at a multiple of the step that the plan was made with."""
    step = max(64, tile.block_n)
    for runs in (tile, prefix_tiles.tile_for_causal(tile)):
        keys, columns = backend("tma").box(runs, 128, page_size, step)
        assert columns == 64
        assert page_size % keys == step % keys == runs.block_n % keys == 0

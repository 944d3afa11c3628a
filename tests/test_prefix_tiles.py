"""The specialised prefix tile as a choice: who gets it, in which launches, and who keeps the plain one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hydragen
from hydragen import PackedKV, PagedKV, prefix_tiles, tuning
from hydragen.prefix_tiles import PREFIX_TILES, PrefixTile, min_rows, prefix_tile_for
from hydragen.target import H200, Target
from hydragen.validation import check_attention
from hydragen.work import WorkPlan, make_work_plan


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a measurement had decided for one of the tiles, whatever the shape."""

    def one_for_all(arch: int, _k: int, _v: int, itemsize: int, **_: float) -> PrefixTile | None:
        return PREFIX_TILES["wide"] if arch == 90 and itemsize == 2 else None

    monkeypatch.setattr(tuning, "prefix_tile_for", one_for_all)


def planned(
    q: Tensor,
    kv: Any,
    target: Target = H200,
    batch_invariant: bool = False,
    reserved: bool = False,
    **given: Any,
) -> Any:
    """A checked call and its plan for a device that is not here."""
    call = check_attention(q, kv, **{**dict.fromkeys(OPTIONS), **DEFAULTS, **given})
    lens, on_device = call.kv_lens.planned, len(call.kv_lens.on_device) > 0
    return call, make_work_plan(
        call.tree, call.nodes, lens, on_device, call.q_starts, call.q_lens, call.heads, target,
        batch_invariant,
        reserved=reserved,
    )  # fmt: skip


OPTIONS = (
    "tree", "kv_lens", "cu_seqlens_q", "max_seqlen_q", "scale", "window", "softcap", "sinks", "out_dtype",
)  # fmt: skip
DEFAULTS = {"causal": False, "return_lse": False, "validate": False}


def zeros(*size: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.zeros(size, dtype=dtype)


def levels(
    sizes: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float16
) -> list[tuple[Tensor, Tensor]]:
    """Levels of (nodes, tokens) with 2 KV heads of 64 elements."""
    return [(zeros(*size, 2, 64, dtype=dtype), zeros(*size, 2, 64, dtype=dtype)) for size in sizes]


def special(plan: WorkPlan) -> list[bool]:
    return [launch.tile.prefix is not None for launch in plan.work.launches]


def test_nobody_gets_it_before_it_is_measured() -> None:
    some = {"traffic": 1.0, "num_blocks": 64, "num_sms": 132}
    assert prefix_tile_for(80, 128, 128, 2, **some) is None
    assert prefix_tile_for(100, 128, 128, 2, **some) is None
    assert prefix_tile_for(90, 128, 64, 2, **some) is None
    assert prefix_tile_for(90, 96, 96, 2, **some) is None
    assert prefix_tile_for(90, 128, 128, 4, **some) is None


@pytest.mark.parametrize(
    ("traffic", "num_blocks", "name", "persistent"),
    [
        (0.09, 256, "wide", True),
        (0.19, 16, "wide", True),
        (0.36, 16, "single", False),
        (0.36, 17, "wide+1", True),
        (0.72, 256, "wide+1", True),
        (0.96, 256, "narrow+2", True),
        (1.44, 128, "narrow+2", True),
        (23, 34, "narrow+2", True),
        (1.44, 33, "single", False),
    ],
)
def test_what_is_best_for_a_shape(traffic: float, num_blocks: int, name: str, persistent: bool) -> None:
    tile = prefix_tile_for(90, 128, 128, 2, traffic=traffic, num_blocks=num_blocks, num_sms=132)
    assert tile == replace(PREFIX_TILES[name], persistent=persistent)


@pytest.mark.usefixtures("chosen")
def test_from_so_many_rows_on() -> None:
    for group_rows, expected in ((min_rows(128), True), (min_rows(128) - 4, False)):
        _, plan = planned(zeros(group_rows // 4, 1, 8, 64), levels([(1, 4096), (group_rows // 4, 16)]))
        assert special(plan) == [expected, False]


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize(
    ("target", "dtype", "batch_invariant"),
    [
        (Target(80, 108, 312e12, 2e12), torch.float16, False),
        (Target(100, 148, 2e15, 8e12), torch.float16, False),
        (H200, torch.float32, False),
        (H200, torch.float16, True),
    ],
)
def test_not_elsewhere(target: Target, dtype: torch.dtype, batch_invariant: bool) -> None:
    q, kv = zeros(512, 1, 8, 64, dtype=dtype), levels([(1, 4096), (512, 16)], dtype)
    _, plan = planned(q, kv, target, batch_invariant)
    assert not any(special(plan))


@pytest.mark.usefixtures("chosen")
def test_where_another_tree_may_follow_too() -> None:
    kv = levels([(1, 4096), (512, 16)])
    _, plan = planned(zeros(512, 1, 8, 64), kv, reserved=True)
    assert special(plan) == [True, False]
    tree = hydragen.PrefixTree.from_levels([[4096], [16] * 512])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hydragen.planned.target_of", lambda _: H200)
        made = hydragen.plan(tree, kv, num_q_heads=8, reserve=2.0, backend="reference")
    assert special(made._work) == [False, True, False]  # for any segments, in three kinds of tiles


@pytest.mark.usefixtures("chosen")
def test_one_launch_reads_several_levels_and_nothing_is_lost() -> None:
    sizes = [(1, 1000), (2, 500), (512, 16)]
    _, plan = planned(zeros(512, 1, 8, 64), levels(sizes))
    assert special(plan) == [True, False]
    shared, own = plan.work.launches
    keys = (shared.items[:, 4] - shared.items[:, 3]) * np.minimum(shared.tile.block_m, shared.items[:, 6] * 4)
    for level, (_, tokens) in enumerate(sizes[:2]):
        assert keys[shared.items[:, 1] == level].sum() == tokens * 512 * 4
    assert len(own.items) * own.heads // 2 == 512


@pytest.mark.triton
@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize(("levels_shared", "served"), [(1, True), (4, True), (5, False)])
def test_how_many_levels_one_launch_serves(levels_shared: int, served: bool) -> None:
    """A descriptor is an argument of the kernel; beyond those that it has, the plain tile does the launch."""
    from hydragen.backends.launches import attend_launcher  # noqa: PLC0415 - needs Triton
    from hydragen.backends.tma import TmaLauncher, levels_of  # noqa: PLC0415 - needs Triton
    from hydragen.backends.tokens import locate  # noqa: PLC0415 - the same

    kv = levels([(2, 256)] * levels_shared + [(512, 16)])
    call, plan = planned(zeros(512, 1, 8, 64), kv)
    assert special(plan) == [True, False]
    assert levels_of(plan.work.launches[0], call) == tuple(range(levels_shared))
    other = replace(plan.work.launches[0], num_items=np.ones(1, np.int32))  # other trees may follow
    assert levels_of(other, call) == tuple(range(levels_shared + 1))
    launcher = attend_launcher(plan, call, locate(plan, call, kernels_clamp=True), 0)
    assert isinstance(launcher, TmaLauncher) == served


@pytest.mark.triton
@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize(
    "what",
    [
        *("plain", "causal", "causal, small steps", "window", "softcap", "scale", "tiny scale", "pages"),
        *("heads first", "packed", "interleaved"),
    ],
)
def test_which_calls_it_serves(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain tile stays behind it: options and layouts belong to the run, not to the plan."""
    from hydragen.backends.launches import attend_launcher  # noqa: PLC0415 - needs Triton
    from hydragen.backends.tma import TmaLauncher  # noqa: PLC0415 - needs Triton
    from hydragen.backends.tokens import locate  # noqa: PLC0415 - the same

    q, kv = zeros(256, 2, 8, 64), levels([(1, 512), (256, 16)])
    given: dict[str, Any] = {
        "causal": {"causal": True}, "causal, small steps": {"causal": True}, "window": {"window": 9},
        "softcap": {"softcap": 3.0}, "scale": {"scale": -1.0}, "tiny scale": {"scale": 1e-40},
    }.get(what, {})  # fmt: skip
    if what == "causal, small steps":
        monkeypatch.setattr(tuning, "prefix_tile_for", lambda *_, **__: PREFIX_TILES["narrow+2"])
    elif what == "pages":
        pages = np.arange(33)
        kv = PagedKV(zeros(64, 8, 2, 64), zeros(64, 8, 2, 64), [0, 32, 33], pages)
        given = {"tree": hydragen.PrefixTree.from_parents([-1, 0], row_to_node=[1] * 256)}
    elif what == "heads first":
        kv[0] = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in kv[0])
    elif what == "interleaved":
        both = zeros(1, 512, 2, 2, 64)
        kv[0] = (both[:, :, 0], both[:, :, 1])
    elif what == "packed":
        kv[0] = PackedKV(kv[0][0][0], kv[0][1][0], [0, 512])
    call, plan = planned(q, kv, **given)
    assert any(special(plan)) == (what != "pages")
    launcher = attend_launcher(plan, call, locate(plan, call, kernels_clamp=True), 0)
    served = ("plain", "causal", "causal, small steps", "packed", "interleaved")
    assert isinstance(launcher, TmaLauncher) == (what in served)


@pytest.mark.triton
@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize(
    ("size", "measured", "served"),
    [
        (16, True, True),
        (128, True, True),
        (8, True, True),
        (24, True, False),
        (4, True, False),
        (8, False, False),
    ],
)
def test_which_pages_it_serves(
    size: int, measured: bool, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of whole groups of 8 keys that fill a step or are filled by steps, once they are measured."""
    from hydragen.backends import tma  # noqa: PLC0415 - needs Triton
    from hydragen.backends.launches import attend_launcher  # noqa: PLC0415 - the same
    from hydragen.backends.tokens import locate  # noqa: PLC0415 - the same

    if measured:
        monkeypatch.setattr(prefix_tiles, "MEASURED_PAGES", {size})
    pages = -(-512 // size)
    kv = PagedKV(
        zeros(600, size, 2, 64), zeros(600, size, 2, 64), [0, pages, pages + 1], np.arange(pages + 1)
    )
    tree = hydragen.PrefixTree.from_parents([-1, 0], row_to_node=[1] * 256)
    call, plan = planned(zeros(256, 2, 8, 64), kv, tree=tree)
    assert any(special(plan)) == measured
    launcher = attend_launcher(plan, call, locate(plan, call, kernels_clamp=True), 0)
    assert isinstance(launcher, tma.TmaLauncher) == served


@pytest.mark.parametrize("tile", PREFIX_TILES.values(), ids=PREFIX_TILES.keys())
def test_which_tile_serves_causal_calls(tile: PrefixTile) -> None:
    """One with as many rows, since the items are cut for those, and that compiles without spills."""
    found = prefix_tiles.tile_for_causal(replace(tile, persistent=True))
    assert found.persistent
    assert found.block_m == tile.block_m
    assert prefix_tiles.tile_for_causal(found) == found


@pytest.mark.parametrize("tile", PREFIX_TILES.values(), ids=PREFIX_TILES.keys())
def test_registers_add_up(tile: PrefixTile) -> None:
    """What the producer gives away is what the consumers get, and a multiprocessor has that many."""
    groups = tile.consumers + 1
    assert tile.registers * 128 * groups <= 65536
    assert tile.consumers * tile.consumer_registers + 24 <= groups * tile.registers
    assert tile.registers % 8 == tile.consumer_registers % 8 == 0


def test_an_even_share_for_each_program() -> None:
    tile = PrefixTile(128, 2, 2, 136, 192, persistent=True)
    assert [tile.num_programs(tasks, 132) for tasks in (1, 132, 133, 256, 1000)] == [1, 132, 67, 128, 125]
    assert PREFIX_TILES["wide"].num_programs(256, 132) == 256

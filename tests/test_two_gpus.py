"""Plans and tensors on a GPU that is not the current one, and on other streams than the current one."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from steps import BATCH, HEADS, KV_HEADS, LAYOUTS, PREFIX, ROOM, TREE, growing, layer, normal, queries, same
from torch import Tensor

import hydragen
from hydragen.testing import Problem, assert_within_budget, run
from hydragen.testing.adapters.ours import attend

pytestmark = [pytest.mark.gpu, pytest.mark.triton]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
# Wide enough for splits, a merge, and the specialised tile of sm_90
PROBLEM = Problem(
    (-1, 0, 0, -1), (2100, 70, 0, 33), (0,) * 150 + (1,) * 130 + (2, 3), (1,) * 282, 8, 2, 128, 128,
    torch.bfloat16, sharpness="peaked",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _the_current_device_stays() -> Iterator[None]:
    before = torch.cuda.current_device()
    yield
    assert torch.cuda.current_device() == before


@needs_two
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_on_the_second_gpu_is_within_the_budget(dtype: torch.dtype, sinks: bool) -> None:
    problem = dataclasses.replace(PROBLEM, dtype=dtype, sinks=sinks)

    def on_the_second(problem: Problem, inputs: Any) -> Any:
        found = attend(problem, inputs.to("cuda:0").to("cuda:1"))
        assert all(x.device == torch.device("cuda:1") for x in found)
        return found

    assert_within_budget(problem, *run(on_the_second, problem))


@needs_two
def test_the_gpus_give_the_same_bits_in_turns() -> None:
    """A kernel is compiled and its tables uploaded for each device."""
    found = []
    for index in (1, 0, 1, 0):
        device = torch.device("cuda", index)
        shared, own = (
            normal(2, *shape, KV_HEADS, 64, seed=1, device=device).half() for shape in ((1, 1500), (300, 20))
        )
        q = normal(300, 1, HEADS, 64, device=device).half()
        found.append(hydragen.attention(q, [tuple(shared), tuple(own)], return_lse=True))
        assert found[-1].out.device == device
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a.cpu(), b.cpu())


def decode(layout: str, device: torch.device) -> tuple[list[Any], Tensor]:
    """Every step's result, and the keys that were appended."""
    kv, lens, views = growing(layout, device)
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, kv_lens=lens)
    if layout == "levels":
        tensors, own = kv, lens[1]
    else:
        tensors, own = (tuple(views[:2]) if layout == "paged" else (kv.k, kv.v)), lens[1:]
    outs = []
    for step in range(ROOM):
        own.add_(1)
        plan.update(lens)
        k, v = normal(2, BATCH, 1, KV_HEADS, 16, seed=step, device=device)
        plan.append(tensors, k, v)
        outs.append(plan.run(queries(seed=step, device=device), tensors, return_lse=True))
    return outs, views[0]


@needs_two
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_grows_on_the_second_gpu_as_on_the_first(layout: str) -> None:
    (first, first_keys), (second, second_keys) = (
        decode(layout, torch.device("cuda", index)) for index in (0, 1)
    )
    assert second_keys.device.index == 1
    # NaN where nothing has been written
    assert torch.equal(first_keys.nan_to_num().cpu(), second_keys.nan_to_num().cpu())
    for a, b in zip(first, second, strict=True):
        assert b.out.device.index == 1
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x.cpu(), y.cpu())


@needs_two
def test_a_graph_captured_on_the_second_gpu() -> None:
    device = torch.device("cuda:1")
    kv, lens, _ = growing("levels", device)
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, kv_lens=lens)
    q = queries(device=device)
    plan.run(q, kv)
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            lens[1].add_(1)
            plan.update(lens)
            found = plan.run(q, kv, return_lse=True)
    for _ in range(ROOM):
        graph.replay()
        torch.cuda.synchronize(device)
        same(found, hydragen.attention(q, kv, tree=TREE, kv_lens=lens, return_lse=True))


@needs_two
def test_tensors_of_two_gpus_are_refused() -> None:
    there, here = (layer(0, torch.device("cuda", index)) for index in (1, 0))
    q = queries(device="cuda:0")
    with pytest.raises(ValueError, match=r"k must be on the device of q, cuda:0, got cuda:1"):
        hydragen.attention(q, there, tree=TREE)
    plan = hydragen.plan(TREE, there, num_q_heads=HEADS)
    with pytest.raises(ValueError, match=r"q must be on the device that the plan was made for, cuda:1"):
        plan.run(q, there)
    with pytest.raises(ValueError, match="device"):
        plan.run(queries(device="cuda:1"), here)
    lens = torch.zeros(BATCH, dtype=torch.int64, device="cuda:0")
    with pytest.raises(ValueError, match=r"kv_lens.*device"):
        hydragen.attention(q.to("cuda:1"), there, tree=TREE, kv_lens=[None, lens])
    plan_that_grows = hydragen.plan(TREE, there, num_q_heads=HEADS, kv_lens=[None, lens.to("cuda:1")])
    with pytest.raises(ValueError, match=r"kv_lens.*device"):
        plan_that_grows.update([None, lens])
    plan_that_grows.update([None, lens.to("cuda:1") + 1])
    new = normal(2, BATCH, 1, KV_HEADS, 16, device="cuda:0")
    with pytest.raises(ValueError, match="device"):
        plan_that_grows.append(there, new[0], new[1])
    states = [
        hydragen.attention(q.to(kv[0][0].device), kv, tree=TREE, return_lse=True) for kv in (here, there)
    ]
    with pytest.raises(ValueError, match="device"):
        hydragen.merge_states(states)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_made_on_one_stream_runs_on_others(layout: str) -> None:
    device = torch.device("cuda")
    expected, expected_keys = decode(layout, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found, keys = decode(layout, device)
    stream.synchronize()
    assert torch.equal(keys.nan_to_num(), expected_keys.nan_to_num())  # NaN where nothing has been written
    for a, b in zip(expected, found, strict=True):
        same(a, b)


def test_one_plan_runs_on_two_streams_in_turns() -> None:
    """A plan has memory of its own for partial results: runs may be on any stream, one after another."""
    device = torch.device("cuda")
    q, kv = normal(64, 1, 8, 64, device=device), normal(2, 1, 40 * PREFIX, 2, 64, device=device)
    tree = hydragen.PrefixTree.from_parents([-1], row_to_node=[0] * 64)
    levels = [(kv[0], kv[1])]
    plan = hydragen.plan(tree, levels, num_q_heads=8)
    expected = plan.run(q, levels, return_lse=True)
    streams = [torch.cuda.Stream() for _ in range(2)]
    before = torch.cuda.current_stream()
    found = []
    for i in range(20):
        stream = streams[i % 2]
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            found.append(plan.run(q, levels, return_lse=True))
        before = stream
    torch.cuda.synchronize()
    for one in found:
        same(expected, one)

"""Lengths that live on the device: never read, clamped to the capacity, and one plan for all of them.

On a CPU, tensors count as host lengths; here they are made to count as the device's, so that the code that
serves a GPU runs in the interpreter and in the reference as well.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from judged import attend, check
from torch import Tensor

import hydragen
from hydragen import api, lengths
from hydragen.testing import Problem, assert_within_budget, view
from hydragen.testing.bounds import checked_accesses
from hydragen.validation import planned, queries

PROBLEM = Problem(
    parents=(-1, 0, 0, 1),
    kv_lens=(37, 5, 0, 20),
    row_to_node=(3, 2, 1, 2),
    q_lens=(3, 1, 2, 1),
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    head_dim_v=8,
    sharpness="peaked",
)
OPTIONS = [{}, {"causal": True}, {"causal": True, "window": 9, "sinks": True, "softcap": 9.0}]
CPU = torch.device("cpu")
OPTION_NAMES = ["plain", "causal", "everything"]


@pytest.fixture(autouse=True)
def tensors_count_as_on_the_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (lengths, queries):
        monkeypatch.setattr(module, "on_device", lambda x: isinstance(x, Tensor))
    api._PLANS.clear()
    yield
    api._PLANS.clear()


def on(device: torch.device, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
def test_packed(options: dict[str, Any], backend: str, device: torch.device) -> None:
    problem = replace(PROBLEM, **options)
    kv_lens = on(device, problem.kv_lens)
    check(problem, backend, device, spare=3, kv_lens=kv_lens, cu_seqlens_q=[0, 3, 4, 6, 7])


@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
def test_levels(options: dict[str, Any], backend: str, device: torch.device) -> None:
    problem = replace(PROBLEM, **options)
    kv_lens = [on(device, [37], torch.int64), on(device, [5, 0]), [20]]
    check(problem, backend, device, layout="levels", spare=3, kv_lens=kv_lens, cu_seqlens_q=[0, 3, 4, 6, 7])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_lengths_out_of_range_are_clamped(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    large = torch.iinfo(dtype).max
    clamped = replace(PROBLEM, kv_lens=(37, 20, 0, 20))
    inputs = clamped.tensors()
    cu_seqlens_q = [0, 3, 4, 6, 7]
    for layout in ("packed", "levels"):
        given = [large, large, -7, 21]
        kv_lens: Any = on(device, given, dtype)
        if layout == "levels":
            # its second level has room for 20 tokens per node
            kv_lens = [on(device, lens, dtype) for lens in (given[:1], [large, -large], given[3:])]
        check(clamped, backend, device, inputs, layout=layout, kv_lens=kv_lens, cu_seqlens_q=cu_seqlens_q)


def test_nodes_not_numbered_by_level(backend: str, device: torch.device) -> None:
    problem = replace(PROBLEM, parents=(-1, 0, -1, 1, 2), kv_lens=(9, 20, 17, 3, 2), row_to_node=(3, 4, 2, 1))
    kv_lens = [on(device, [9, 17]), on(device, [20, 2]), None]
    for _ in range(2):
        check(problem, backend, device, layout="levels", kv_lens=kv_lens, cu_seqlens_q=[0, 3, 4, 6, 7])


@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
@pytest.mark.parametrize("max_seqlen_q", [3, 8])
def test_offsets_of_queries(
    max_seqlen_q: int, options: dict[str, Any], backend: str, device: torch.device
) -> None:
    problem = replace(PROBLEM, **options)
    offsets = on(device, [0, 3, 4, 6, 7])
    check(problem, backend, device, cu_seqlens_q=offsets, max_seqlen_q=max_seqlen_q)
    kv_lens = on(device, problem.kv_lens)
    check(problem, backend, device, spare=2, kv_lens=kv_lens, cu_seqlens_q=offsets, max_seqlen_q=max_seqlen_q)


def test_rows_without_queries(backend: str, device: torch.device) -> None:
    problem = replace(PROBLEM, q_lens=(3, 2), row_to_node=(3, 1), causal=True)
    tree = hydragen.PrefixTree.from_parents(problem.parents, row_to_node=(0, 3, 2, 1, 1))
    offsets = on(device, [0, 0, 3, 3, 5, 5], torch.int64)
    check(problem, backend, device, tree=tree, cu_seqlens_q=offsets, max_seqlen_q=4)


def test_batch_invariant(backend: str, device: torch.device) -> None:
    problem = replace(PROBLEM, causal=True, sinks=True)
    arguments = {"kv_lens": on(device, problem.kv_lens), "spare": 3, "batch_invariant": True}
    out, lse = check(problem, backend, device, **arguments, cu_seqlens_q=[0, 3, 4, 6, 7])
    again = check(
        problem, backend, device, **arguments, cu_seqlens_q=on(device, [0, 3, 4, 6, 7]), max_seqlen_q=5
    )
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])


def test_one_plan_for_all_lengths(backend: str, device: torch.device) -> None:
    """A decode loop: the suffixes grow from step to step, in place."""
    problem = replace(PROBLEM, parents=(-1, 0, 0), kv_lens=(20, 18, 18), row_to_node=(1, 2), q_lens=(1, 1))
    inputs = problem.tensors(device)
    seen = view(problem, inputs, "levels")
    for step, lens in enumerate([(0, 0), (1, 0), (17, 18)]):
        state = hydragen.attention(
            seen.q,
            seen.kv,
            tree=seen.tree,
            kv_lens=[None, on(device, lens)],
            return_lse=True,
            backend=backend,
            causal=True,
        )
        k, v = (
            torch.cat([x[:20], x[20 : 20 + lens[0]], x[38 : 38 + lens[1]]]).cpu()
            for x in (inputs.k, inputs.v)
        )
        now = replace(problem, kv_lens=(20, *lens), causal=True)
        offsets = torch.tensor([0, 20, 20 + lens[0], 20 + sum(lens)]).int()
        given = replace(inputs.to("cpu"), k=k, v=v, cu_seqlens_k=offsets)
        assert_within_budget(now, seen.packed(state.out), seen.packed(state.lse), inputs=given)
        assert len(api._PLANS) == 1, f"another plan at step {step}"


def test_validate_reads_them(device: torch.device) -> None:
    arguments = {"cu_seqlens_q": [0, 3, 4, 6, 7], "validate": True}
    attend(PROBLEM, "reference", device, kv_lens=on(device, PROBLEM.kv_lens), **arguments)
    with pytest.raises(ValueError, match=r"kv_lens must not exceed .* got 38 at index 0 where kv has 37"):
        attend(PROBLEM, "reference", device, kv_lens=on(device, [38, 5, 0, 20]), **arguments)
    arguments["cu_seqlens_q"] = on(device, [0, 3, 4, 6, 7])
    with pytest.raises(ValueError, match=r"max_seqlen_q must be at least .* 3, got 2"):
        attend(PROBLEM, "reference", device, max_seqlen_q=2, **arguments)


def test_offsets_out_of_range_stay_in_memory(backend: str, device: torch.device) -> None:
    """Rows that the offsets describe rightly come out right; the others write nowhere outside of out."""
    inputs = PROBLEM.tensors(device)
    right = on(device, [0, 3, 4, 6, 7])
    out, lse = attend(PROBLEM, backend, device, inputs, cu_seqlens_q=right, max_seqlen_q=3)
    for bad in ([0, 3, 4, 6, 10**6], [0, 3, 4, 10**6, 2**31 - 1], [0, 3, 4, -9, -5]):
        got = attend(PROBLEM, backend, device, inputs, cu_seqlens_q=on(device, bad), max_seqlen_q=3)
        assert torch.equal(got[0][:4], out[:4])
        assert torch.equal(got[1][:4], lse[:4])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kv_lens": [37.0, 5.0, 0.0, 20.0]}, TypeError, "kv_lens must be int32 or int64, got torch.float32"),
        (
            {"kv_lens": [37, 5, 0]},
            ValueError,
            r"kv_lens must have shape \[4\], one length per node, got \[3\]",
        ),
        ({"kv_lens": [[37, 5, 0, 20]]}, ValueError, r"kv_lens must have shape \[4\], .*, got \[1, 4\]"),
        (
            {"cu_seqlens_q": [0.0, 3.0, 4.0, 6.0, 7.0], "max_seqlen_q": 3},
            TypeError,
            "cu_seqlens_q must be int32",
        ),
        (
            {"cu_seqlens_q": [[0, 3, 4, 6, 7]], "max_seqlen_q": 3},
            ValueError,
            r".*num_rows \+ 1.* shape \[1, 5\]",
        ),
        (
            {"cu_seqlens_q": [0, 3, 4, 6, 7]},
            ValueError,
            "max_seqlen_q must be given when cu_seqlens_q lives on",
        ),
        (
            {"cu_seqlens_q": [0, 3, 4, 6, 7], "max_seqlen_q": -1},
            ValueError,
            "max_seqlen_q must be .* at least 0",
        ),
    ],
)
def test_wrong_lengths_on_the_device(
    arguments: dict[str, Any], error: type[Exception], message: str, device: torch.device
) -> None:
    right = {"cu_seqlens_q": [0, 3, 4, 6, 7]}
    there = {
        name: x if name == "max_seqlen_q" else torch.tensor(x, device=device) for name, x in arguments.items()
    }
    with pytest.raises(error, match=f"^{message}"):
        attend(PROBLEM, "reference", device, **{**right, **there})


MASKS = [{"window": 9}, {"causal": True}, {"causal": True, "window": 2}]


@pytest.mark.parametrize("options", MASKS, ids=str)
def test_tiles_without_a_single_query(options: dict[str, Any], backend: str, device: torch.device) -> None:
    """8 rows of 40 have a query: the positions of the others, infinities, must not overflow."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    q, prefix, suffix = normal(8, 1, 16), normal(2, 1, 70, 1, 16), normal(2, 40, 4, 1, 16)
    kv = [tuple(prefix), tuple(suffix)]
    offsets = on(device, [0, *range(1, 9), *[8] * 32])
    with checked_accesses() if backend == "triton" and device.type == "cpu" else nullcontext():
        out = hydragen.attention(q, kv, cu_seqlens_q=offsets, max_seqlen_q=1, backend=backend, **options)
    filled = [tuple(prefix), tuple(x[:8] for x in suffix)]
    expected = hydragen.attention(q[:, None], filled, backend=backend, **options)
    torch.testing.assert_close(out, expected[:, 0])


@pytest.mark.parametrize("options", [{}, {"causal": True, "window": 4}], ids=["plain", "causal"])
def test_scattered_nodes_are_clamped(options: dict[str, Any], backend: str, device: torch.device) -> None:
    problem = replace(PROBLEM, parents=(-1, 0, -1, 1, 2), kv_lens=(9, 0, 17, 3, 2), row_to_node=(3, 4, 2, 1))
    problem = replace(problem, **options)
    kv_lens = [on(device, [9, 17]), on(device, [-5, 2]), None]
    check(problem, backend, device, layout="levels", kv_lens=kv_lens, cu_seqlens_q=[0, 3, 4, 6, 7])


def test_lengths_of_all_nodes_with_as_few_launches_as_can_be() -> None:
    """Nodes that are not neighbours are put in their places, and lengths below 0 count as 0."""
    planned = torch.tensor([9, 5, 17, 3], dtype=torch.int32)
    scattered = lengths.KVLens(planned.numpy().astype("int64"), ((np.array([0, 2]), on(CPU, [-5, 20])),))
    assert scattered.unclamped(planned) is None
    clamped = scattered.clamped(planned, lambda nodes: lengths.node_index(nodes, {}, CPU))
    assert clamped.tolist() == [0, 5, 17, 3]
    neighbours = scattered._replace(on_device=((np.array([1, 2]), on(CPU, [4, 16])),))
    assert neighbours.unclamped(planned).tolist() == [9, 4, 16, 3]


def test_lengths_on_the_device_have_a_plan_of_their_own(backend: str, device: torch.device) -> None:
    """First full lengths on the host, then the same capacities with lengths on the device."""
    q, (k, v) = torch.ones(2, 1, 2, 16, device=device), torch.randn(2, 2, 30, 1, 16).to(device)
    full = hydragen.attention(q, [(k, v)], kv_lens=[[30, 30]], backend=backend)
    short = hydragen.attention(q, [(k, v)], kv_lens=[on(device, [3, 30])], backend=backend)
    assert not torch.equal(full[0], short[0])
    torch.testing.assert_close(full[1], short[1])


def test_offsets_of_a_plan_made_in_inference_mode(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a plan owns can be updated outside of the mode in which it was made."""
    monkeypatch.setattr(planned, "on_device", lambda x: isinstance(x, Tensor))
    tree, kv = hydragen.PrefixTree.from_levels([[4], [3, 3]]), torch.randn(2, 10, 2, 16, device=device)
    packed = hydragen.PackedKV(kv[0], kv[1], [0, 4, 7, 10])
    with torch.inference_mode():
        first = on(device, [0, 2, 3])
        plan = hydragen.plan(
            tree, packed, num_q_heads=4, cu_seqlens_q=first, max_seqlen_q=2, total_q=3, backend=backend
        )
    other, q = on(device, [0, 1, 3]), torch.randn(3, 4, 16, device=device)
    plan.update(cu_seqlens_q=other)
    expected = hydragen.attention(
        q, packed, tree=tree, cu_seqlens_q=[0, 1, 3], causal=True, backend="reference"
    )
    torch.testing.assert_close(plan.run(q, packed, causal=True), expected)

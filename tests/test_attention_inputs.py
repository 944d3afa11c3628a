"""What attention is given: lengths, strides, poison, NaN in the data; and that it is left as it was."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from judged import attend, check
from torch import Tensor

import hydragen
import hydragen.work
from hydragen import PackedKV, api
from hydragen.testing import Inputs, Problem, oracle, restride, view
from hydragen.testing.views import MEMORY

PROBLEM = Problem(
    parents=(-1, 0, 0, 0),
    kv_lens=(33, 4, 0, 17),
    row_to_node=(1, 2, 3),
    q_lens=(1, 2, 1),
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    head_dim_v=8,
    sharpness="peaked",
)

FORMS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "numpy int64": np.array,
    "numpy uint8": lambda lens: np.array(lens, np.uint8),
    "strided numpy": lambda lens: np.repeat(lens, 2)[::2],
    "int32 tensor": lambda lens: torch.tensor(lens, dtype=torch.int32),
    "int64 tensor": torch.tensor,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["packed", "levels"])
def test_lengths_on_the_host(form: str, layout: str, device: torch.device) -> None:
    make = FORMS[form]
    lens = list(PROBLEM.kv_lens)
    kv_lens = make(lens) if layout == "packed" else [make(lens[:1]), make(lens[1:])]
    check(PROBLEM, "reference", device, layout=layout, spare=4, kv_lens=kv_lens)


@pytest.mark.parametrize("form", ["tuple", "numpy int64", "int32 tensor"])
def test_offsets_of_queries(form: str, device: torch.device) -> None:
    check(PROBLEM, "reference", device, cu_seqlens_q=FORMS[form]([0, 1, 3, 4]), max_seqlen_q=2)


@pytest.mark.parametrize("form", ["list", "numpy uint8", "int64 tensor"])
def test_offsets_of_keys(form: str, device: torch.device) -> None:
    inputs = PROBLEM.tensors(device)
    kv = PackedKV(inputs.k, inputs.v, FORMS[form]([0, 33, 37, 37, 54]))
    seen = view(PROBLEM, inputs)
    expected = hydragen.attention(seen.q, seen.kv, tree=seen.tree, cu_seqlens_q=seen.cu_seqlens_q)
    assert torch.equal(hydragen.attention(seen.q, kv, tree=seen.tree, cu_seqlens_q=[0, 1, 3, 4]), expected)


def test_none_is_the_whole_level(backend: str, device: torch.device) -> None:
    problem = replace(PROBLEM, kv_lens=(33, 17, 17, 17))
    check(problem, backend, device, layout="levels", kv_lens=[None, None])
    check(problem, backend, device, layout="levels", kv_lens=[None, [17, 17, 17]])


def test_lengths_of_the_tree(backend: str, device: torch.device) -> None:
    tree = hydragen.PrefixTree.from_parents(PROBLEM.parents, PROBLEM.kv_lens, row_to_node=PROBLEM.row_to_node)
    for layout in ("packed", "levels"):
        check(PROBLEM, backend, device, layout=layout, spare=5, tree=tree, kv_lens=None)


@pytest.mark.parametrize("layout", ["packed", "levels"])
@pytest.mark.parametrize("memory", MEMORY)
def test_strides(memory: str, layout: str, backend: str, device: torch.device) -> None:
    """Every element between those of q, k and v is NaN, and so is what follows each segment."""
    check(PROBLEM, backend, device, layout=layout, memory=memory, spare=3)


def test_expanded_views(backend: str, device: torch.device) -> None:
    """Strides of 0: one KV head, one token and one node seen many times."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(shape, generator=generator) for shape in ((3, 2, 4, 16), (1, 5, 1, 16), (1, 1, 1, 8))
    )
    q, k, v = (x.to(device) for x in (q, k, v))
    wide = (k.expand(3, 5, 2, 16), v.expand(3, 5, 2, 8))
    assert 0 in wide[0].stride()
    assert 0 in wide[1].stride()
    got = hydragen.attention(q[:1].expand(3, -1, -1, -1), [wide], backend=backend)
    expected = hydragen.attention(
        q[:1].repeat(3, 1, 1, 1), [tuple(x.contiguous() for x in wide)], backend=backend
    )
    assert torch.equal(got, expected)
    # all values of a head are one vector, so it comes out whatever the weights
    torch.testing.assert_close(got, v.expand(3, 2, 4, 8), rtol=1e-6, atol=1e-6)


def test_levels_of_different_strides(backend: str, device: torch.device) -> None:
    problem = replace(PROBLEM, row_to_node=(1, 2, 3), q_lens=(1, 1, 1))
    seen = view(problem, problem.tensors(device), "levels", spare=2)
    kv = [
        tuple(restride(x, memory) for x in level)
        for level, memory in zip(seen.kv, ("heads_first", "interleaved"), strict=True)
    ]
    kv[1] = (kv[1][0], seen.kv[1][1])  # and values that lie otherwise than their keys
    state = hydragen.attention(
        seen.q, kv, tree=seen.tree, kv_lens=seen.kv_lens, backend=backend, return_lse=True
    )
    expected = check(problem, backend, device, layout="levels", spare=2)
    assert torch.equal(seen.packed(state.out), expected[0])
    assert torch.equal(seen.packed(state.lse), expected[1])


def rows_of(problem: Problem, node: int) -> Tensor:
    """Which query tokens have `node` on their path, bool [total_q]."""
    on_path = [node in problem.path(row) for row in range(problem.num_rows)]
    return torch.tensor(on_path).repeat_interleave(torch.tensor(problem.q_lens))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("node", [0, 3])
def test_what_is_not_finite_flows_to_the_rows_that_see_it(
    node: int, which: str, value: float, backend: str, device: torch.device
) -> None:
    clean = PROBLEM.tensors()
    inputs = clean.clone()
    first = int(inputs.cu_seqlens_k[node])
    getattr(inputs, which)[first + 2, 1] = value
    got = attend(PROBLEM, backend, device, inputs)
    expected = oracle(PROBLEM, inputs)
    sees = rows_of(PROBLEM, node)
    for mine, truth, untouched in zip(
        got, (expected.out, expected.lse), attend(PROBLEM, backend, device, clean), strict=True
    ):
        assert torch.equal(mine.cpu()[~sees], untouched.cpu()[~sees])
        # KV head 1 serves query heads 2 and 3
        assert torch.equal(mine.cpu()[sees, :2], untouched.cpu()[sees, :2])
        there = mine.cpu()[sees, 2:].double()
        torch.testing.assert_close(there, truth[sees, 2:], rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("masks", [{}, {"causal": True, "window": 50}], ids=["plain", "masked"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_stays_with_its_head(
    value: float,
    masks: dict[str, Any],
    backend: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where one tile serves several KV heads, and multiplies the others' values by a weight of 0."""
    monkeypatch.setattr(hydragen.work, "heads_per_program", lambda *_: 2)
    api._PLANS.clear()
    problem = replace(PROBLEM, dtype=torch.float16)
    clean = problem.tensors()
    inputs = clean.clone()
    inputs.v[[2, 40], 1] = value  # in the prefix and in a suffix
    got = attend(problem, backend, device, inputs, **masks)
    untouched = attend(problem, backend, device, clean, **masks)
    assert {launch.heads for plan in api._PLANS.values() for launch in plan.work.launches} == {2}
    api._PLANS.clear()
    assert torch.equal(got[0][:, :2], untouched[0][:, :2])
    assert torch.equal(got[1], untouched[1])
    assert not got[0][:, 2:].isfinite().any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_a_query_of_nan_keeps_it_to_itself(backend: str, device: torch.device) -> None:
    clean = PROBLEM.tensors()
    inputs = clean.clone()
    inputs.q[1, 0] = torch.nan
    out, lse = (x.cpu() for x in attend(PROBLEM, backend, device, inputs))
    clean_out, clean_lse = (x.cpu() for x in attend(PROBLEM, backend, device, clean))
    assert out[1, 0].isnan().all()
    assert lse[1, 0].isnan()
    clean_out[1, 0], clean_lse[1, 0] = out[1, 0], lse[1, 0]
    assert torch.equal(out.nan_to_num(9.0), clean_out.nan_to_num(9.0))
    assert torch.equal(lse.nan_to_num(9.0), clean_lse.nan_to_num(9.0))


@pytest.mark.parametrize("layout", ["packed", "levels"])
def test_nothing_is_modified(layout: str, backend: str, device: torch.device) -> None:
    problem = replace(PROBLEM, sinks=True, causal=True, softcap=3.0, window=20)
    inputs = problem.tensors(device)
    seen = view(problem, inputs, layout, spare=2)
    lens = np.array(problem.kv_lens)
    kv_lens: Any = lens if layout == "packed" else [lens[:1], lens[1:]]
    kv = [(seen.kv.k, seen.kv.v)] if isinstance(seen.kv, PackedKV) else seen.kv
    tensors = [seen.q, inputs.sinks, *(x for level in kv for x in level)]
    before = [x.clone() for x in tensors]
    offsets = seen.cu_seqlens_q.clone()
    attend(problem, backend, device, inputs, layout=layout, spare=2)  # may share memory with `seen`
    hydragen.attention(
        seen.q,
        seen.kv,
        tree=seen.tree,
        kv_lens=kv_lens,
        cu_seqlens_q=seen.cu_seqlens_q,
        causal=True,
        softcap=3.0,
        window=20,
        sinks=inputs.sinks,
        return_lse=True,
        backend=backend,
    )
    for x, copy in zip(tensors, before, strict=True):
        torch.testing.assert_close(x, copy, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(seen.cu_seqlens_q, offsets)
    assert lens.tolist() == list(problem.kv_lens)


def test_results_are_new_tensors(backend: str, device: torch.device) -> None:
    """Even where one row attends to one key, whose value is the result."""
    problem = Problem(parents=(-1,), kv_lens=(1,), row_to_node=(0,), q_lens=(1,))
    inputs: Inputs = problem.tensors(device)
    before = inputs.v.clone()
    out, _ = attend(problem, backend, device, inputs)
    out.zero_()
    assert torch.equal(inputs.v, before)
    assert before.any()


def test_fresh_memory_is_poison(device: torch.device) -> None:
    """What nobody writes would show in every test here."""
    x = torch.ones(2, device=device)
    for fresh in (torch.empty(3, device=device), x.new_empty(2, 2), torch.empty_like(x)):
        assert fresh.isnan().all()
    assert (torch.empty(3, dtype=torch.int32, device=device) == 2**31 - 1).all()


@pytest.mark.parametrize("how", ["every other", "one for all"])
@pytest.mark.parametrize("levels", [1, 2])
def test_sinks_of_any_stride(how: str, levels: int, backend: str, device: torch.device) -> None:
    """A view of sinks is read by its stride, by the tiles and by the merge, in every run of a plan too."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(40, 1, 4, 16, generator=generator).to(device)
    sizes = [(1, 70), (40, 5)][:levels]
    kv = [tuple(torch.randn(2, n, m, 2, 16, generator=generator).to(device)) for n, m in sizes]
    plain = (
        torch.arange(0.0, 8.0, 2.0, device=device) if how == "every other" else torch.ones(4, device=device)
    )
    view = torch.arange(8.0, device=device)[::2] if how == "every other" else plain[:1].expand(4)
    expected = hydragen.attention(q, kv, sinks=plain, backend=backend)
    assert torch.equal(hydragen.attention(q, kv, sinks=view, backend=backend), expected)
    tree = hydragen.PrefixTree.from_levels(
        [[70], [5] * 40][:levels], row_to_node=[0] * 40 if levels == 1 else None
    )
    plan = hydragen.plan(tree, kv, num_q_heads=4, backend=backend)
    for sinks in (plain, view, view, plain):
        torch.testing.assert_close(plan.run(q, kv, sinks=sinks), expected)


def test_the_same_starts_and_a_longer_last_row(backend: str, device: torch.device) -> None:
    """What a plan is found by includes how long rows are: the last one's length shows in no other's start."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 16, generator=generator).to(device) for n in (3, 5, 5))
    for q_len in (1, 3, 2):
        found = hydragen.attention(q[:, :q_len], [(k, v)], backend=backend)
        for i in range(q_len):
            single = hydragen.attention(q[:, i : i + 1], [(k, v)], backend=backend)
            torch.testing.assert_close(found[:, i : i + 1], single)

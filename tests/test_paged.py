"""A pool of pages: judged like every other layout, and equal to packed tensors bit for bit."""

from typing import Any

import pytest
import torch
from judged import attend, check
from pages import paged
from torch import Tensor

import hydragen
from hydragen import PackedKV, PagedKV, PrefixTree
from hydragen.testing import Problem, assert_within_budget, view
from hydragen.testing.bounds import checked_accesses

HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16, "head_dim_v": 16}
TREE = ((-1, 0, 0, -1), (45, 18, 7, 0), (1, 2, 2, 3))
PROBLEMS = {
    "decode": Problem(*TREE, (1, 1, 1, 1), **HEADS, sharpness="peaked"),
    "masked": Problem(*TREE, (3, 1, 4, 1), **HEADS, causal=True, window=20, sharpness="peaked", sinks=True),
    "one head, other sizes": Problem((-1, 0), (33, 9), (1, 1), (2, 1), 3, 1, 24, 40, softcap=3.0),
}
PAGE_SIZES = [1, 3, 16, 64]


def on_pages(
    problem: Problem, backend: str, device: torch.device, page_size: int, **how: Any
) -> tuple[Tensor, Tensor]:
    """Out and lse of a problem whose keys and values lie in pages."""
    inputs = problem.tensors().to(device)
    packed = view(problem, inputs)
    kv = paged(inputs.k, inputs.v, problem.kv_lens, page_size, **how)
    state = hydragen.attention(
        packed.q, kv, tree=packed.tree, kv_lens=list(problem.kv_lens), cu_seqlens_q=packed.cu_seqlens_q,
        scale=problem.scale, causal=problem.causal, window=problem.window, softcap=problem.softcap,
        sinks=inputs.sinks, return_lse=True, backend=backend, validate=True,
    )  # fmt: skip
    assert isinstance(state, hydragen.AttentionState)
    return state


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_pages_are_judged_by_the_oracle(
    problem: Problem, page_size: int, backend: str, device: torch.device
) -> None:
    assert_within_budget(problem, *on_pages(problem, backend, device, page_size))


@pytest.mark.parametrize("layout", ["HND", "one"])
def test_other_layouts_are_views(layout: str, backend: str, device: torch.device) -> None:
    problem = PROBLEMS["decode"]
    assert_within_budget(problem, *on_pages(problem, backend, device, 16, layout=layout, spare_pages=2))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_paged_equals_packed_bit_for_bit(
    problem: Problem, page_size: int, backend: str, device: torch.device
) -> None:
    out, lse = on_pages(problem, backend, device, page_size)
    packed_out, packed_lse = attend(problem, backend, device)
    assert torch.equal(out, packed_out)
    assert torch.equal(lse, packed_lse)


def test_nodes_may_share_pages(backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 6, 4, 2, 16, generator=generator).to(device)
    q = torch.randn(3, 1, 4, 16, generator=generator).to(device)
    tree = PrefixTree.from_parents([-1, -1, 1], row_to_node=[0, 1, 2])
    kv = PagedKV(k, v, [0, 3, 5, 8], [4, 2, 0, 2, 4, 0, 0, 5])
    out = hydragen.attention(q, kv, tree=tree, kv_lens=[9, 8, 7], backend=backend)

    def tokens(x: Tensor, pages: list[int], length: int) -> Tensor:
        return torch.cat([x[page] for page in pages])[:length]

    runs = [([4, 2, 0], 9), ([2, 4], 8), ([0, 0, 5], 7)]
    packed = [torch.cat([tokens(x, *run) for run in runs]) for x in (k, v)]
    expected = hydragen.attention(q, PackedKV(*packed, [0, 9, 17, 24]), tree=tree, backend=backend)
    assert torch.equal(out, expected)


def test_page_numbers_on_the_device_outside_of_the_pool_are_clamped(
    backend: str, device: torch.device
) -> None:
    k, v = torch.randn(2, 3, 4, 2, 16, generator=torch.Generator().manual_seed(0)).to(device)
    q = torch.ones(1, 1, 4, 16, device=device)
    wrong = torch.tensor([-7, 2**31 - 1, 1], dtype=torch.int32, device=device)
    if device.type == "cpu":  # on a CPU every table is on the host, where it is checked
        with pytest.raises(ValueError, match=r"kv\.page_indices must hold numbers of pages, 0 to 2, got -7"):
            hydragen.attention(q, PagedKV(k, v, [0, 3], wrong), backend=backend)
        return
    out = hydragen.attention(q, PagedKV(k, v, [0, 3], wrong), backend=backend)
    right = torch.tensor([0, 2, 1], dtype=torch.int32, device=device)
    assert torch.equal(out, hydragen.attention(q, PagedKV(k, v, [0, 3], right), backend=backend))
    with pytest.raises(ValueError, match=r"kv\.page_indices must hold numbers of pages"):
        hydragen.attention(q, PagedKV(k, v, [0, 3], wrong), backend=backend, validate=True)


@pytest.mark.triton
def test_kernels_clamp_page_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter too, where a table on the "device" gets past the checks only by force."""
    if torch.cuda.is_available():
        pytest.skip("the test before this one does it on the device")
    monkeypatch.setattr("hydragen.validation.pages._check_range", lambda *_: None)
    k, v = torch.randn(2, 3, 4, 2, 16, generator=torch.Generator().manual_seed(0))
    q = torch.ones(1, 1, 4, 16)
    for size in (4, 2):  # pages that hold a step, and pages that do not
        pool = [x.reshape(-1, size, 2, 16) for x in (k, v)]
        last = pool[0].shape[0] - 1
        with checked_accesses():
            out = hydragen.attention(q, PagedKV(*pool, [0, 3], [-7, 2**31 - 1, 1]), backend="triton")
        right = hydragen.attention(q, PagedKV(*pool, [0, 3], [0, last, 1]), backend="triton")
        assert torch.equal(out, right)


def test_a_packed_level_equals_a_padded_one(backend: str, device: torch.device) -> None:
    problem = PROBLEMS["masked"]
    inputs = problem.tensors().to(device)
    levels = view(problem, inputs, "levels")
    assert levels.kv_lens is not None
    kv = []
    for (k, v), lens in zip(levels.kv, levels.kv_lens, strict=True):
        offsets = torch.tensor([0, *lens]).cumsum(0)
        kv.append(
            PackedKV(*(torch.cat([n[:t] for n, t in zip(x, lens, strict=True)]) for x in (k, v)), offsets)
        )
    mixed = [kv[0], *levels.kv[1:]]
    for given, kv_lens in ((kv, None), (mixed, [None, *levels.kv_lens[1:]])):
        state = hydragen.attention(
            levels.q, given, tree=levels.tree, kv_lens=kv_lens, cu_seqlens_q=levels.cu_seqlens_q,
            scale=problem.scale, causal=True, window=20, sinks=inputs.sinks, return_lse=True, backend=backend,
        )  # fmt: skip
        assert_within_budget(problem, levels.packed(state.out), levels.packed(state.lse))


def test_partial_results_in_float32(backend: str, device: torch.device) -> None:
    problem = Problem(*TREE, (1, 1, 1, 1), **HEADS, dtype=torch.float16, sharpness="peaked")
    exact, lse = attend(problem, backend, device, out_dtype=torch.float32)
    out, _ = check(problem, backend, device)
    assert exact.dtype == torch.float32
    assert lse.dtype == torch.float32
    assert torch.equal(exact.half(), out)
    assert not torch.equal(exact, out.float())


POOL = torch.zeros(5, 4, 2, 8)
WRONG: list[tuple[str, dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ("table too long", {"page_indices": [0, 1, 2]}, ValueError, ("kv.page_indptr", "3", "got 2")),
    ("decreasing", {"page_indptr": [0, 2, 1, 2]}, ValueError, ("kv.page_indptr must not decrease",)),
    ("from 1", {"page_indptr": [1, 2]}, ValueError, ("kv.page_indptr must begin with 0",)),
    ("too high", {"page_indices": [0, 5]}, ValueError, ("kv.page_indices", "0 to 4", "got 5 at index 1")),
    ("page negative", {"page_indices": [-1, 0]}, ValueError, ("kv.page_indices", "got -1 at index 0")),
    ("float table", {"page_indices": [0.0, 1.0]}, TypeError, ("kv.page_indices must hold integers",)),
    ("rank", {"k_cache": POOL[0]}, ValueError, ("kv.k_cache must be [num_pages, page_size",)),
    ("heads", {"v_cache": POOL[:, :, :1]}, ValueError, ("same num_pages, page_size and num_kv_heads",)),
    ("dtype", {"v_cache": POOL.double()}, TypeError, ("kv.v_cache must have the dtype of q",)),
    ("no size", {"k_cache": POOL[:, :0], "v_cache": POOL[:, :0]}, ValueError, ("page_size of at least 1",)),
    ("nodes", {"page_indptr": [0, 1, 2]}, ValueError, ("2 nodes in kv.page_indptr for 1 rows of q",)),
    ("empty", {"k_cache": POOL[:0], "v_cache": POOL[:0], "page_indices": []}, ValueError, ("page_indptr",)),
    ("integers", {"k_cache": POOL.long()}, TypeError, ("kv.k_cache must have one of the dtypes",)),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "parts"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_pages_are_refused(
    changes: dict[str, Any], error: type[Exception], parts: tuple[str, ...]
) -> None:
    right = {"k_cache": POOL, "v_cache": POOL, "page_indptr": [0, 2], "page_indices": [0, 4]}
    q = torch.zeros(1, 1, 4, 8)
    hydragen.attention(q, PagedKV(**right))
    with pytest.raises(error) as caught:
        hydragen.attention(q, PagedKV(**{**right, **changes}))
    for part in parts:
        assert part in str(caught.value)

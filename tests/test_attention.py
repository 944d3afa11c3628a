"""hydragen.attention against the float64 oracle: structures, options, heads, dtypes, on every backend."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from judged import attend, check

import hydragen
import hydragen.work
from hydragen import api
from hydragen.testing import Problem, view
from hydragen.tiles import Tile

BASE = Problem(
    parents=(-1, 0, 0, 1),
    kv_lens=(37, 5, 0, 20),
    row_to_node=(3, 2, 1, 2),
    q_lens=(3, 1, 2, 1),
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    head_dim_v=16,
    sharpness="peaked",
)


def decode(parents: tuple[int, ...], kv_lens: tuple[int, ...], row_to_node: tuple[int, ...]) -> Problem:
    """BASE's heads on another tree, one query per row."""
    return replace(
        BASE, parents=parents, kv_lens=kv_lens, row_to_node=row_to_node, q_lens=(1,) * len(row_to_node)
    )


STRUCTURES = {
    "one row, one node": decode((-1,), (5,), (0,)),
    "one token": decode((-1,), (1,), (0,)),
    "nothing to attend": replace(decode((-1,), (0,), (0, 0)), head_dim_v=24),
    "one node, several rows": decode((-1,), (33,), (0, 0, 0)),
    "prefix and suffixes": decode((-1, 0, 0, 0), (40, 7, 1, 16), (1, 2, 3)),
    "empty prefix": decode((-1, 0, 0), (0, 3, 17), (1, 2)),
    "empty suffixes": decode((-1, 0, 0), (18, 0, 0), (1, 2)),
    "some rows have nothing": decode((-1, -1, 0), (0, 9, 0), (2, 1, 0)),
    "two roots": decode((-1, -1, 0, 1), (20, 31, 2, 3), (3, 2, 3, 2)),
    "nothing shared": decode((-1, -1, -1), (3, 16, 34), (0, 1, 2)),
    "a chain": decode((-1, 0, 1, 2, 3), (5, 1, 0, 17, 2), (4, 0, 2)),
    "three levels": decode((-1, 0, 0, 1, 1, 2, 2), (19, 6, 3, 1, 2, 3, 4), (3, 4, 5, 6)),
    "rows at inner nodes, out of order": decode((-1, 0, 1, 0, -1), (7, 5, 3, 2, 4), (3, 0, 2, 1, 4, 2)),
    "nodes without rows": decode((-1, 0, 0, -1), (7, 5, 3, 9), (1, 1)),
    "nodes not numbered by level": decode((-1, 0, 1, -1, 3, 0), (4, 5, 6, 7, 8, 9), (2, 4, 5, 2)),
    "around tile borders": decode((-1, 0, 0, 0, 0, 0, 0), (16, 15, 17, 31, 32, 33, 1), (1, 2, 3, 4, 5, 6)),
    "a prefix that is split": decode((-1, 0, 0), (300, 3, 5), (1, 2)),
    "many rows, one huge group": decode((-1, -1, 0), (40, 3, 2), (0,) * 20 + (1, 2)),
    "queries of several lengths": BASE,
    "more queries than keys": replace(BASE, kv_lens=(2, 0, 0, 1), q_lens=(5, 3, 4, 1)),
}

OPTIONS = {
    "causal": {"causal": True},
    "causal, more queries than keys": {"causal": True, "kv_lens": (2, 0, 0, 1), "q_lens": (5, 3, 4, 1)},
    "causal over a long prefill": {"causal": True, "kv_lens": (20, 30, 0, 21), "q_lens": (21, 1, 40, 9)},
    "window of one": {"window": 1},
    "window within a segment": {"window": 4, "causal": True},
    "window across segments": {"window": 23, "causal": True},
    "window without causal": {"window": 11},
    "window of exactly the path": {"window": 62},
    "huge window": {"window": 2**31, "causal": True},
    "softcap": {"softcap": 5.0},
    "tight softcap": {"softcap": 0.01},
    "wide softcap": {"softcap": 1e6},
    "sinks": {"sinks": True},
    "sinks and empty rows": {"sinks": True, "kv_lens": (0, 0, 0, 4)},
    "sinks, one partial per row": {"sinks": True, "kv_lens": (37, 0, 0, 0)},
    "negative scale": {"scale": -0.3},
    "scale of zero": {"scale": 0.0},
    "large scale": {"scale": 3.0},
    "everything": {"causal": True, "window": 9, "softcap": 20.0, "sinks": True, "scale": 0.4},
    "negative scale, softcap, window": {"scale": -0.5, "softcap": 2.0, "window": 30},
    "lopsided logits": {"sharpness": "lopsided"},
    "very negative logits": {"sharpness": "very_negative"},
    "very negative logits and sinks": {"sharpness": "some_very_negative", "sinks": True},
    "repeated keys and queries": {"sharpness": "repeated"},
}

HEADS = [(1, 1), (3, 1), (5, 1), (6, 2), (7, 7), (8, 1), (16, 1), (16, 2), (33, 1), (12, 12)]
HEAD_DIMS = [
    (1, 1),
    (5, 5),
    (8, 8),
    (33, 20),
    (16, 48),
    (72, 64),
    (80, 96),
    (129, 129),
    (192, 128),
    (256, 256),
]


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure(name: str, backend: str, device: torch.device) -> None:
    check(STRUCTURES[name], backend, device)


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure_in_levels(name: str, backend: str, device: torch.device) -> None:
    check(STRUCTURES[name], backend, device, layout="levels", spare=2)


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Splits of 16 keys, whatever would be fastest."""
    monkeypatch.setattr(hydragen.work, "split_size", lambda *_, **__: 16)
    api._PLANS.clear()
    yield
    api._PLANS.clear()


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize(
    "name", ["one token", "around tile borders", "a prefix that is split", "nothing to attend"]
)
def test_structure_in_splits(name: str, backend: str, device: torch.device) -> None:
    check(STRUCTURES[name], backend, device)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize(
    "name", ["causal over a long prefill", "everything", "very negative logits and sinks"]
)
def test_options_in_splits(name: str, backend: str, device: torch.device) -> None:
    problem = replace(BASE, **OPTIONS[name])
    check(problem, backend, device)
    (plan,) = api._PLANS.values()
    splits = [-(-kv_len // 16) for kv_len in problem.kv_lens]
    per_row = [sum(splits[node] for node in problem.path(row)) for row in range(problem.num_rows)]
    assert plan.work.num_partials == sum(n * q_len for n, q_len in zip(per_row, problem.q_lens, strict=True))


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("name", ["causal", "everything", "window across segments", "lopsided logits"])
def test_several_kv_heads_in_one_tile(
    heads: int, name: str, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever would be fastest: that takes more rows than an interpreter has time for."""

    def per_program(*arguments: object) -> int:
        (tile,) = (x for x in arguments if isinstance(x, Tile))
        return heads if tile.block_m == 16 else 1

    monkeypatch.setattr(hydragen.work, "heads_per_program", per_program)
    api._PLANS.clear()
    problem = replace(BASE, num_q_heads=8, num_kv_heads=4, dtype=torch.float16, **OPTIONS[name])
    check(problem, backend, device, spare=3)
    check(problem, backend, device, layout="levels", memory="heads_first")
    assert any(launch.heads == heads for plan in api._PLANS.values() for launch in plan.work.launches)
    api._PLANS.clear()


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, backend: str, device: torch.device) -> None:
    check(replace(BASE, **OPTIONS[name]), backend, device)


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), HEADS)
def test_heads(num_q_heads: int, num_kv_heads: int, backend: str, device: torch.device) -> None:
    kv_lens = (17, 2, 0, 9)
    check(replace(BASE, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, kv_lens=kv_lens), backend, device)


@pytest.mark.parametrize(("head_dim", "head_dim_v"), HEAD_DIMS)
def test_head_dims(head_dim: int, head_dim_v: int, backend: str, device: torch.device) -> None:
    check(replace(BASE, head_dim=head_dim, head_dim_v=head_dim_v), backend, device, memory="sliced")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sharpness", ["flat", "peaked", "lopsided"])
def test_dtypes(dtype: torch.dtype, sharpness: str, backend: str, device: torch.device) -> None:
    check(replace(BASE, dtype=dtype, sharpness=sharpness), backend, device)


def test_half_with_everything(backend: str, device: torch.device) -> None:
    check(replace(BASE, dtype=torch.float16, **OPTIONS["everything"]), backend, device)


@pytest.mark.parametrize("name", ["causal", "everything", "very negative logits"])
def test_float64_on_the_reference(name: str, device: torch.device) -> None:
    check(replace(BASE, dtype=torch.float64, **OPTIONS[name]), "reference", device)


def test_a_batch_of_equal_rows_is_the_packed_batch(backend: str, device: torch.device) -> None:
    problem = replace(BASE, q_lens=(2, 2, 2, 2), causal=True)
    inputs = problem.tensors(device)
    seen = view(problem, inputs)
    batch = inputs.q.unflatten(0, (4, 2))
    packed = hydragen.attention(
        seen.q, seen.kv, tree=seen.tree, cu_seqlens_q=[0, 2, 4, 6, 8], causal=True, backend=backend
    )
    together = hydragen.attention(batch, seen.kv, tree=seen.tree, causal=True, backend=backend)
    assert torch.equal(together.flatten(0, 1), packed)
    check(problem, backend, device)


def test_without_a_tree_levels_are_equal_groups(backend: str, device: torch.device) -> None:
    problem = decode((-1, -1, 0, 0, 1, 1), (9, 20, 3, 4, 5, 6), (2, 2, 3, 3, 4, 4, 5, 5))
    given = problem.tensors(device)
    seen = view(problem, given, "levels")
    got = hydragen.attention(seen.q, seen.kv, kv_lens=seen.kv_lens, backend=backend, return_lse=True)
    expected = hydragen.attention(
        seen.q, seen.kv, tree=seen.tree, kv_lens=seen.kv_lens, backend=backend, return_lse=True
    )
    assert torch.equal(got.out, expected.out)
    assert torch.equal(got.lse, expected.lse)
    check(problem, backend, device, layout="levels")


def test_packed_without_a_tree_is_one_node_per_row(backend: str, device: torch.device) -> None:
    problem = decode((-1, -1, -1), (3, 16, 34), (0, 1, 2))
    check(problem, backend, device, tree=None)


def test_without_return_lse_out_is_the_same(backend: str, device: torch.device) -> None:
    for changes in ({}, {"kv_lens": (37, 0, 0, 0)}):
        problem = replace(BASE, sinks=True, **changes)
        seen = view(problem, problem.tensors(device))
        sinks = problem.tensors(device).sinks
        arguments = {"tree": seen.tree, "cu_seqlens_q": seen.cu_seqlens_q, "sinks": sinks, "backend": backend}
        out = hydragen.attention(seen.q, seen.kv, **arguments)
        state = hydragen.attention(seen.q, seen.kv, **arguments, return_lse=True)
        assert isinstance(out, torch.Tensor)
        assert isinstance(state, hydragen.AttentionState)
        assert torch.equal(out, state.out)


def test_rows_without_queries(backend: str, device: torch.device) -> None:
    """A packed row may be empty: an engine keeps its place in the batch."""
    problem = decode((-1, 0, 0, 0), (20, 3, 4, 5), (1, 3))
    inputs = problem.tensors(device)
    tree = hydragen.PrefixTree.from_parents(problem.parents, row_to_node=(0, 1, 2, 3, 3))
    out, lse = attend(problem, backend, device, inputs, tree=tree, cu_seqlens_q=[0, 0, 1, 1, 2, 2])
    expected = attend(problem, backend, device, inputs)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_auto_is_the_backend_of_the_device(device: torch.device) -> None:
    expected = attend(BASE, "triton" if device.type == "cuda" else "reference", device)
    got = attend(BASE, "auto", device)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_lengths_given_go_before_those_of_the_tree(backend: str, device: torch.device) -> None:
    tree = hydragen.PrefixTree.from_levels([[20], [4, 4]])
    q, (k, v) = torch.ones(2, 1, 2, 16, device=device), torch.randn(2, 28, 1, 16).to(device)
    kv = hydragen.PackedKV(k, v, [0, 20, 24, 28])
    given = hydragen.attention(q, kv, tree=tree, kv_lens=[7, 1, 4], backend=backend)
    known = hydragen.PrefixTree.from_parents([-1, 0, 0], [7, 1, 4])
    assert torch.equal(given, hydragen.attention(q, kv, tree=known, backend=backend))
    assert not torch.equal(given, hydragen.attention(q, kv, tree=tree, backend=backend))


def test_the_callers_offsets_stay_writable(backend: str, device: torch.device) -> None:
    offsets = np.array([0, 2, 5])
    q, (k, v) = torch.ones(5, 2, 16, device=device), torch.randn(2, 5, 1, 16).to(device)
    kv = hydragen.PackedKV(k, v, offsets)
    hydragen.attention(q, kv, cu_seqlens_q=offsets, backend=backend)
    offsets[1] = 3  # raises if it has been made read-only


@pytest.mark.parametrize("scale", [1e-60, 1e-40, -1e-60, 0.0])
def test_a_scale_that_float32_does_not_know(scale: float, backend: str, device: torch.device) -> None:
    q, (k, v) = torch.ones(1, 1, 2, 16, device=device), torch.randn(2, 1, 21, 1, 16).to(device)
    out = hydragen.attention(q, [(k, v)], scale=scale, backend=backend)
    torch.testing.assert_close(out[0, 0], v[0].mean(0).expand(2, 16))


def test_no_query_at_all(backend: str, device: torch.device) -> None:
    q, (k, v) = torch.ones(0, 1, 2, 16, device=device), torch.randn(2, 1, 21, 1, 16).to(device)
    for batch_invariant in (False, True):
        out = hydragen.attention(q, [(k, v)], batch_invariant=batch_invariant, backend=backend)
        assert out.shape == q.shape
        kv = hydragen.PackedKV(k[0, :4], v[0, :4], [0, 4, 4])
        packed = hydragen.attention(
            q[:, 0], kv, cu_seqlens_q=[0, 0, 0], batch_invariant=batch_invariant, backend=backend
        )
        assert packed.shape == (0, 2, 16)


def test_the_default_device_is_not_asked() -> None:
    """Only where tensors are counts; with rows in another order than the tree's, which are looked at."""
    tree = hydragen.PrefixTree.from_parents([-1, 0, 0], row_to_node=[2, 1])
    kv = hydragen.PackedKV(*torch.randn(2, 12, 2, 8), [0, 5, 8, 12])
    q = torch.randn(2, 1, 4, 8)
    expected = hydragen.attention(q, kv, tree=tree, backend="reference")
    torch.set_default_device("meta")
    try:
        out = hydragen.attention(q, kv, tree=tree, backend="reference")
    finally:
        torch.set_default_device(None)
    assert torch.equal(out, expected)

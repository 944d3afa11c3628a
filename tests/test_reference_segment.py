"""One block of segments: tiles, masks, unused tails, gradients and the memory bound."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from hydragen_reference import segment
from hydragen_reference.decomposed import attend
from hydragen_reference.oracle import dense_attention


def random_segment(seed, num_segments, num_tokens, kv_len, heads=(4, 2), head_dims=(8, 8), **to):
    generator = torch.Generator().manual_seed(seed)
    (num_q_heads, num_kv_heads), (head_dim, head_dim_v) = heads, head_dims
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(**to)
        for shape in (
            (num_segments, num_tokens, num_q_heads, head_dim),
            (num_segments, kv_len, num_kv_heads, head_dim),
            (num_segments, kv_len, num_kv_heads, head_dim_v),
        )
    ]


def assert_is_dense(state, q, k, v, kv_lens, tolerance=1e-13, **options):
    """Compare with the oracle, segment by segment; the queries sit at the end of the keys in use."""
    for i, kv_len in enumerate(kv_lens):
        out, lse = dense_attention(
            *(x.double().numpy() for x in (q[i], k[i, :kv_len], v[i, :kv_len])), **options
        )
        np.testing.assert_allclose(state.out[i].detach().double().numpy(), out, rtol=0, atol=tolerance)
        np.testing.assert_allclose(
            state.lse[i].detach().double().numpy(), lse, rtol=tolerance, atol=tolerance
        )


@pytest.fixture(params=[16, 2], ids=["tiles of segments", "tiles of queries"])
def small_tiles(request, monkeypatch):
    """Many tiles along every axis, with borders in the middle of things."""
    monkeypatch.setattr(segment, "KEYS_PER_CHUNK", 3)
    monkeypatch.setattr(segment, "CPU_TILE", 3 * 2 * request.param)
    monkeypatch.setattr(segment, "MIN_QUERY_ROWS", 4)


@pytest.mark.parametrize("kv_len", [0, 1, 2, 3, 4, 7, 9])
@pytest.mark.parametrize(("num_segments", "num_tokens"), [(1, 7), (5, 1), (3, 4)])
def test_tiles_change_nothing(small_tiles, kv_len, num_segments, num_tokens):
    q, k, v = random_segment(0, num_segments, num_tokens, kv_len)
    assert_is_dense(attend(q, k, v), q, k, v, [kv_len] * num_segments)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (10, 2), (7, 1), (16, 2)])
@pytest.mark.parametrize("head_dims", [(1, 3), (5, 1), (129, 64), (256, 256)])
def test_heads_and_head_dims(heads, head_dims):
    q, k, v = random_segment(1, 2, 3, 5, heads, head_dims)
    assert_is_dense(attend(q, k, v), q, k, v, [5, 5])


@pytest.mark.parametrize("empty", ["num_segments", "num_tokens", "kv_len"])
def test_empty_axes(empty):
    sizes = {"num_segments": 2, "num_tokens": 3, "kv_len": 4} | {empty: 0}
    q, k, v = random_segment(2, **sizes, head_dims=(8, 6))
    state = attend(q, k, v)
    assert state.out.shape == (sizes["num_segments"], sizes["num_tokens"], 4, 6)
    assert state.lse.shape == state.out.shape[:-1]
    assert not state.out.any()
    assert (state.lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_partials_are_in_the_accumulation_dtype(dtype):
    q, k, v = random_segment(3, 2, 3, 600, dtype=dtype)
    state = attend(q, k, v)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert state.out.dtype == state.lse.dtype == expected
    assert_is_dense(state, q, k, v, [600] * 2, 1e-13 if dtype == torch.float64 else 2e-6)


def test_autocast_does_not_lower_the_precision():
    q, k, v = random_segment(4, 1, 3, 20, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = attend(q, k, v)
    assert_is_dense(state, q, k, v, [20], 1e-6)


def test_unused_tail_never_matters(small_tiles):
    kv_lens = [0, 1, 3, 5, 8]
    q, k, v = random_segment(5, 5, 2, 8)
    for i, kv_len in enumerate(kv_lens):
        k[i, kv_len:], v[i, kv_len:] = torch.nan, torch.inf
    inputs = [x.requires_grad_() for x in (q, k, v)]
    state = attend(*inputs, kv_lens=torch.tensor(kv_lens))
    assert_is_dense(state, *(x.detach() for x in inputs), kv_lens)
    (state.out.sum() + state.lse.clamp(min=-100.0).sum()).backward()
    for x in inputs:
        assert x.grad.isfinite().all()
    for i, kv_len in enumerate(kv_lens):
        assert not k.grad[i, kv_len:].any()
        assert not v.grad[i, kv_len:].any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 4])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_masks_and_softcap(small_tiles, causal, window, softcap):
    kv_lens = torch.tensor([2, 5, 8])  # five queries: some come before the first key
    q, k, v = random_segment(6, 3, 5, 8)
    options = {"causal": causal, "window": window, "softcap": softcap, "scale": -0.8}
    q_pos = kv_lens[:, None] - 5 + torch.arange(5)
    state = attend(q, k, v, kv_lens=kv_lens, q_pos=q_pos, **options)
    assert_is_dense(state, q, k, v, kv_lens.tolist(), **options)
    k_start = torch.tensor([0, 11, 300])  # positions are relative
    moved = attend(q, k, v, kv_lens=kv_lens, q_pos=q_pos + k_start[:, None], k_start=k_start, **options)
    assert torch.equal(moved.out, state.out)
    assert torch.equal(moved.lse, state.lse)


@pytest.mark.parametrize("scale", [0.0, -2.0, 1e4, -1e4])
def test_any_scale(small_tiles, scale):
    q, k, v = random_segment(7, 2, 2, 7)
    assert_is_dense(attend(q, k, v, scale=scale), q, k, v, [7, 7], 1e-11, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [1e4, -1e4, -6e4])
def test_huge_logits_of_either_sign(small_tiles, dtype, offset):
    logits = torch.tensor([0.0, -1.0, 3.0, 1.0, -2.0], dtype=dtype) + offset  # exact in float32
    k = logits.view(1, 5, 1, 1)
    v = torch.arange(10, dtype=dtype).view(1, 5, 1, 2)
    q = torch.ones(1, 1, 1, 1, dtype=dtype)
    assert_is_dense(attend(q, k, v, scale=1.0), q, k, v, [5], 2e-6, scale=1.0)


def test_infinite_and_nan_logits(small_tiles):
    v = torch.arange(1.0, 6.0).view(1, 5, 1, 1)

    def run(*logits):
        q, k = torch.ones(1, 1, 1, 1), torch.tensor(logits).view(1, 5, 1, 1)
        state = attend(q, k, v, scale=1.0)
        assert_is_dense(state, q, k, v, [5], 1e-6, scale=1.0)
        return state.out.item(), state.lse.item()

    inf, nan = torch.inf, torch.nan
    assert run(-inf, -inf, -inf, 2.0, -inf) == (4.0, 2.0)
    assert run(-inf, -inf, -inf, -inf, -inf) == (0.0, -inf)
    assert run(0.0, 1.0, inf, 2.0, 3.0)[1] == inf
    assert np.isnan(run(0.0, nan, 1.0, 2.0, 3.0)).all()


def test_views_and_copies_give_the_same_and_nothing_is_changed(small_tiles):
    q, k, v = random_segment(8, 3, 2, 7)
    kv_lens = torch.tensor([7, 0, 4])
    expected = attend(q, k, v, kv_lens=kv_lens)
    copies = [x.clone() for x in (q, k, v, kv_lens)]
    turned = [x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for x in (q, k, v)]
    for got, want in zip(attend(*turned, kv_lens=kv_lens), expected, strict=True):
        assert torch.equal(got, want)
    for x, copy in zip((q, k, v, kv_lens), copies, strict=True):
        assert torch.equal(x, copy)


def test_gradients_are_right_also_for_rows_without_keys(small_tiles):
    # Segment 0 is empty, segment 1 shorter than its queries: causal leaves the first of them without keys.
    kv_lens = torch.tensor([0, 2, 5])
    q_pos = kv_lens[:, None] - 3 + torch.arange(3)
    inputs = [x.requires_grad_() for x in random_segment(9, 3, 3, 5, (2, 1), (2, 3))]

    def run(q, k, v):
        state = attend(q, k, v, kv_lens=kv_lens, q_pos=q_pos, causal=True, window=4, softcap=2.0)
        return state.out, torch.where(state.lse == -torch.inf, 0.0, state.lse)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_only_the_gradients_asked_for():
    q, k, v = random_segment(13, 2, 3, 5)
    for x in (q, k, v):
        x.requires_grad_()
        attend(q, k, v).out.square().sum().backward()
        assert x.grad.any()
        assert sum(y.grad is not None for y in (q, k, v)) == 1
        x.grad = None
        x.requires_grad_(False)


def test_keys_that_are_also_the_values():
    q, k, _ = random_segment(14, 1, 2, 3)
    assert torch.autograd.gradcheck(
        lambda q, k: tuple(attend(q, k, k)), [q.requires_grad_(), k.requires_grad_()]
    )


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="multiple of num_kv_heads, got 3 and 2"):
        attend(*random_segment(10, 1, 1, 1, heads=(3, 2)))
    with pytest.raises(ValueError, match="q_pos must be given with causal or window"):
        attend(*random_segment(11, 1, 1, 1), causal=True)
    with pytest.raises(ValueError, match="q_pos must be given with causal or window"):
        attend(*random_segment(12, 1, 1, 1), window=3)


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
@pytest.mark.parametrize(
    ("batch", "kv_len", "grad", "limit_mib"), [(1_024, 65_536, False, 64), (4_096, 4_096, True, 160)]
)
def test_memory_does_not_grow_with_batch_times_prefix(batch, kv_len, grad, limit_mib):
    # With two heads the scores would take 512 MiB; with gradients 128 MiB, three times or more.
    # A fresh process, since the peak of a process never goes down.
    program = f"""
        import resource
        import torch
        from hydragen_reference.decomposed import attend

        def peak_mib():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        def run(batch, kv_len):
            q = torch.randn(1, batch, 2, 8, requires_grad={grad})
            k, v = torch.randn(2, 1, kv_len, 1, 8)
            state = attend(q, k, v)
            if {grad}:
                (state.out.sum() + state.lse.sum()).backward()

        run(1, 1)
        before = peak_mib()
        run({batch}, {kv_len})
        print(peak_mib() - before, peak_mib())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # no waiting for threads on a busy machine
        check=True,
        capture_output=True,
        text=True,
    )
    growth, peak = map(float, done.stdout.split())
    assert growth < limit_mib
    assert peak < 4096

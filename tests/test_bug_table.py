"""Bugs that shipped in attention kernels, forward pass: one test each, named after what went wrong.

The comment above each test names where it was seen.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from judged import attend, check
from torch import Tensor

import hydragen
import hydragen.work
from hydragen import AttentionState, PackedKV, api
from hydragen.testing import Problem

ROW = Problem(
    parents=(-1, 0, 0),
    kv_lens=(20, 3, 5),
    row_to_node=(1, 2),
    q_lens=(1, 1),
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    head_dim_v=16,
    sharpness="peaked",
)


# flashinfer-ai/flashinfer#4051, vllm-project/vllm#39148, the original's combine
def test_nan_from_inf_minus_inf(backend: str, device: torch.device) -> None:
    """Both states empty; one empty beside a finite one; every key of a block masked."""
    for kv_lens in ((0, 0, 0), (0, 0, 5), (20, 0, 0), (20, 0, 5)):
        out, lse = check(replace(ROW, kv_lens=kv_lens), backend, device)
        assert not out.isnan().any()
        assert not lse.isnan().any()
    # the suffix of the second row hides the whole prefix, in blocks of their own
    check(replace(ROW, kv_lens=(300, 3, 70), causal=True, window=60), backend, device)
    nothing = AttentionState(torch.zeros(2, 4, 16), torch.full((2, 4), -torch.inf))
    merged = hydragen.merge_states([nothing, nothing])
    assert torch.equal(merged.out, nothing.out)
    assert torch.equal(merged.lse, nothing.lse)


# Dao-AILab/flash-attention#978, pytorch/pytorch#134650, flashinfer-ai/flashinfer#4452
def test_empty_row_returns_anything_but_minus_inf_as_lse(backend: str, device: torch.device) -> None:
    out, lse = attend(replace(ROW, kv_lens=(0, 0, 5)), backend, device)
    assert (lse[0] == -torch.inf).all()
    assert (out[0] == 0).all()
    # causal with more queries than keys: the first queries stand before the first key
    problem = replace(ROW, kv_lens=(2, 1, 0), q_lens=(5, 2), causal=True)
    out, lse = check(problem, backend, device)
    assert (lse[:2] == -torch.inf).all()
    assert (out[:2] == 0).all()
    assert lse[2:].isfinite().all()


# flashinfer-ai/flashinfer#4267, #4450
def test_valid_rows_become_0_by_a_finite_infinity(backend: str, device: torch.device) -> None:
    out, lse = check(replace(ROW, sharpness="very_negative", kv_lens=(40, 3, 5)), backend, device)
    assert lse.max() < -5e4
    assert out.abs().amax(-1).min() > 0
    # beside rows of ordinary logits
    many = replace(ROW, sharpness="some_very_negative", row_to_node=(1, 2) * 4, q_lens=(1,) * 8)
    _, lse = check(many, backend, device)
    assert lse.min() < -5e4
    assert lse.max() > -100


# sgl-project/sglang#35045, vllm-project/vllm#47079, pytorch/pytorch#181645
def test_wrong_merge_weights_by_log2_for_ln(backend: str, device: torch.device) -> None:
    """A long prefix and a short suffix: weights far from one half, which the wrong base moves most."""
    check(replace(ROW, kv_lens=(300, 1, 2), sharpness="flat"), backend, device)
    # keys that are all alike: the log of their number, and the share of the suffix, in closed form
    k = torch.zeros(1, 300, 1, 16, device=device)
    v = [torch.zeros(1, 300, 1, 16, device=device), torch.ones(1, 2, 1, 16, device=device)]
    q = torch.ones(1, 1, 1, 16, device=device)
    state = hydragen.attention(q, [(k, v[0]), (k[:, :2], v[1])], backend=backend, return_lse=True)
    torch.testing.assert_close(state.lse.item(), float(np.log(302)), rtol=1e-6, atol=0)
    torch.testing.assert_close(state.out, torch.full_like(state.out, 2 / 302), rtol=1e-6, atol=0)


# vllm-project/flash-attention#87
def test_wrong_lse_layout_where_splits_are_combined(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GQA, one query, long KV and more than one split."""
    monkeypatch.setattr(hydragen.work, "split_size", lambda *_, **__: 64)
    api._PLANS.clear()
    problem = replace(ROW, parents=(-1,), kv_lens=(400,), row_to_node=(0,), q_lens=(1,), num_q_heads=6)
    check(problem, backend, device)
    (plan,) = api._PLANS.values()
    assert plan.work.num_partials == 7
    api._PLANS.clear()


# vllm-project/vllm#22003
def test_merge_ignores_strides(backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    outs = torch.randn(2, 3, 4, 24, generator=generator)[..., :16]  # padded
    lses = torch.randn(2, 4, 3, generator=generator).transpose(1, 2)  # heads before tokens
    assert not outs[0].is_contiguous()
    assert not lses[0].is_contiguous()
    strided = hydragen.merge_states([AttentionState(outs[i], lses[i]) for i in range(2)])
    plain = hydragen.merge_states(
        [AttentionState(outs[i].contiguous(), lses[i].contiguous()) for i in range(2)]
    )
    assert torch.equal(strided.out, plain.out)
    assert torch.equal(strided.lse, plain.lse)
    weights = lses.softmax(0)
    torch.testing.assert_close(strided.out, (weights[..., None] * outs).sum(0))
    # values that are a view of wider ones, as of a fused projection
    for memory in ("sliced", "heads_first"):
        check(replace(ROW, head_dim_v=8), backend, device, memory=memory)


# Dao-AILab/flash-attention#2573
def test_an_empty_row_corrupts_other_rows(backend: str, device: torch.device) -> None:
    """Batch 64, of which rows 1 and 10 are empty; GQA."""
    lens = [0 if row in (1, 10) else 1 + row % 5 for row in range(64)]
    problem = replace(
        ROW, parents=(-1,) * 64, kv_lens=tuple(lens), row_to_node=tuple(range(64)), q_lens=(1,) * 64
    )
    out, lse = check(problem, backend, device, layout="levels")
    assert (lse == -torch.inf).all(1).nonzero().flatten().tolist() == [1, 10]
    assert (out == 0).all(-1).all(-1).nonzero().flatten().tolist() == [1, 10]


# thinking-machines-lab FastTree-Artifact#3
def test_wrong_output_with_several_roots(backend: str, device: torch.device) -> None:
    for row_to_node in ((2, 3), (3, 2), (3, 2, 2, 3), (0, 1), (1, 2)):
        problem = replace(
            ROW,
            parents=(-1, -1, 0, 1),
            kv_lens=(20, 33, 2, 3),
            row_to_node=row_to_node,
            q_lens=(1,) * len(row_to_node),
        )
        check(problem, backend, device)


# vllm-project/vllm#11635
def test_prefix_pass_without_causality_where_queries_overlap_the_prefix(
    backend: str, device: torch.device
) -> None:
    problem = replace(
        ROW, kv_lens=(20, 3, 0), q_lens=(6, 4), causal=True
    )  # 3 and 4 queries stand in the prefix
    out, _ = check(problem, backend, device)
    free, _ = attend(replace(problem, causal=False), backend, device)
    assert not torch.allclose(out[0], free[0]), "causality hides nothing: this tests nothing"


# ROCm/rocm-libraries#12227
def test_sink_counted_twice_or_never(backend: str, device: torch.device) -> None:
    for kv_lens in ((0, 0, 0), (0, 3, 5), (20, 0, 0), (20, 3, 5), (300, 0, 5)):
        problem = replace(ROW, kv_lens=kv_lens, sinks=True)
        _, lse = check(problem, backend, device)
        sinks = problem.tensors().sinks
        assert sinks is not None
        if sum(kv_lens) == 0:
            torch.testing.assert_close(lse.cpu(), sinks.expand(2, 4), rtol=1e-6, atol=1e-6)
    # no key and no logit: two keys of logit 0 and a sink of 0 make log 3, two segments or one
    k, v = torch.zeros(2, 1, 1, 1, 16, device=device)
    q, sinks = torch.ones(1, 1, 2, 16, device=device), torch.zeros(2, device=device)
    for kv in ([(k, v), (k, v)], [(torch.cat([k, k], 1), torch.cat([v, v], 1))]):
        state = hydragen.attention(q, kv, sinks=sinks, return_lse=True, backend=backend)
        torch.testing.assert_close(state.lse, torch.full_like(state.lse, float(np.log(3))))


def keys_seen(q_len: int, cuts: list[int], backend: str, device: torch.device, **masks: object) -> Tensor:
    """Which keys each query sees, [q_len, keys]: scale 0 averages the values, which are unit vectors."""
    total = sum(cuts)
    v = torch.eye(total, device=device).reshape(1, total, 1, total)
    k = torch.ones(1, total, 1, 16, device=device)
    levels = list(zip(k.split(cuts, 1), v.split(cuts, 1), strict=True))
    q = torch.ones(1, q_len, 1, 16, device=device)
    return (hydragen.attention(q, levels, scale=0.0, backend=backend, **masks)[0, :, 0] > 0).cpu()


# flashinfer-ai/flashinfer#5286, huggingface/transformers#29623
@pytest.mark.parametrize("causal", [False, True])
def test_window_off_by_one(causal: bool, backend: str, device: torch.device) -> None:
    """W keys and W + 1 keys, the window's edge on every side of the segments' borders."""
    q_len, cuts = 3, [17, 4]
    total = sum(cuts)
    positions = torch.arange(total - q_len, total)[:, None]
    distance = positions - torch.arange(total)
    for window in (1, 2, 3, 4, 5, 6, 20, 21, 22):
        seen = keys_seen(q_len, cuts, backend, device, causal=causal, window=window)
        expected = distance < window
        if causal:
            expected &= distance >= 0
        assert torch.equal(seen, expected), f"window {window}"


# sgl-project/sglang#33915, flashinfer-ai/flashinfer#1023
def test_option_silently_dropped(backend: str, device: torch.device) -> None:
    problem = replace(ROW, q_lens=(3, 2), sharpness="peaked")
    inputs = problem.tensors(device)
    plain = attend(problem, backend, device, inputs)
    for option in (
        {"scale": 0.7},
        {"causal": True},
        {"window": 4},
        {"softcap": 1.5},
        {"sinks": torch.linspace(0, 3, 4, device=device)},
    ):
        out, lse = attend(problem, backend, device, inputs, **option)
        assert not torch.allclose(out, plain[0], rtol=1e-3, atol=1e-3), option
        assert not torch.allclose(lse, plain[1], rtol=1e-3, atol=1e-3), option
    for unknown in ("k_scale", "v_scale", "dropout_p", "is_causal", "alibi_slopes"):
        with pytest.raises(TypeError, match=unknown):
            attend(problem, backend, device, inputs, **{unknown: 1.0})


# thu-ml/SageAttention#386, sgl-project/sglang#20389
def test_int32_offset_wraparound(backend: str, device: torch.device) -> None:
    """Keys and values more than 2**31 elements into their memory, by token and by node."""
    tokens, stride = 37, 2**26  # the last tokens begin at 36 * 2**26 > 2**31
    size = (tokens - 1) * stride + 2 * 16
    if device.type == "cpu":  # pages that nobody touches take no memory
        memory = torch.from_numpy(np.zeros(size, np.float16))
    else:
        memory = torch.zeros(size, dtype=torch.float16, device=device)
    generator = torch.Generator().manual_seed(0)
    far = memory.as_strided((tokens, 2, 16), (stride, 16, 1))
    far.copy_(torch.randn(tokens, 2, 16, generator=generator))
    near = far.clone()
    assert (tokens - 1) * far.stride(0) > 2**31
    q = torch.randn(2, 1, 4, 16, generator=generator).half().to(device)
    tree = hydragen.PrefixTree.from_parents([-1, 0, 0])
    packed = [
        hydragen.attention(q, PackedKV(x, x, [0, 5, 34, 37]), tree=tree, backend=backend) for x in (far, near)
    ]
    assert torch.equal(*packed)
    nodes = [x[[0, 36]] if x is near else x[::36] for x in (far, near)]
    levels = [hydragen.attention(q, [(x[:, None], x[:, None])], backend=backend) for x in nodes]
    assert torch.equal(*levels)
    # one key each: its value is the result, rounding aside
    torch.testing.assert_close(levels[0][:, 0, ::2], near[[0, 36]], rtol=1e-3, atol=0)


# the original's combine (47 % of the elements were wrong at 129, and its own test passed)
@pytest.mark.parametrize("head_dim", [3, 17, 65, 129])
def test_columns_masked_by_flat_offset_only(head_dim: int, backend: str, device: torch.device) -> None:
    check(replace(ROW, head_dim=head_dim, head_dim_v=head_dim), backend, device)


# lightseekorg/tokenspeed#330
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(65, 1), (65, 65), (96, 8), (128, 2), (128, 128)])
def test_launch_failure_above_1024_threads(
    num_q_heads: int, num_kv_heads: int, backend: str, device: torch.device
) -> None:
    check(
        replace(
            ROW,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=128,
            head_dim_v=128,
            kv_lens=(3, 1, 2),
        ),
        backend,
        device,
    )

"""The oracle against PyTorch's dense attention, and against answers that can be worked out by hand."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hydragen_reference.oracle import dense_attention, tree_attention

HALF_CAP = 0.5


def random_qkv(seed, q_len, kv_len, num_q_heads=4, num_kv_heads=2, head_dim=8, head_dim_v=8):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(q_len, num_q_heads, head_dim)),
        rng.normal(size=(kv_len, num_kv_heads, head_dim)),
        rng.normal(size=(kv_len, num_kv_heads, head_dim_v)),
    )


def torch_dense(q, k, v, mask, scale=None):
    """PyTorch's own dense attention in float64."""
    q, k, v = (torch.from_numpy(x).transpose(0, 1) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(0, 1).numpy()


def torch_lse(q, k, mask, scale):
    group_size = q.shape[1] // k.shape[1]
    keys = torch.from_numpy(k).repeat_interleave(group_size, 1)
    logits = torch.einsum("qhd,khd->qhk", torch.from_numpy(q), keys) * scale
    return torch.logsumexp(logits.masked_fill(~mask[:, None], -torch.inf), -1).numpy()


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 9), (4, 9), (9, 9)])
@pytest.mark.parametrize("causal", [False, True])
def test_oracle_agrees_with_torch(heads, q_len, kv_len, causal):
    q, k, v = random_qkv(0, q_len, kv_len, *heads, head_dim=5, head_dim_v=7)
    mask = torch.ones(q_len, kv_len, dtype=torch.bool)
    if causal:
        mask = mask.tril(kv_len - q_len)
    out, lse = dense_attention(q, k, v, causal=causal)
    np.testing.assert_allclose(out, torch_dense(q, k, v, mask), atol=1e-13)
    np.testing.assert_allclose(lse, torch_lse(q, k, mask, 5**-0.5), atol=1e-13)


@pytest.mark.parametrize("scale", [2.0, 0.0, -0.7])
def test_scale_may_have_any_sign(scale):
    q, k, v = random_qkv(1, 3, 6)
    out, lse = dense_attention(q, k, v, scale=scale)
    mask = torch.ones(3, 6, dtype=torch.bool)
    np.testing.assert_allclose(out, torch_dense(q, k, v, mask, scale=scale), atol=1e-13)
    np.testing.assert_allclose(lse, torch_lse(q, k, mask, scale), atol=1e-13)


@pytest.mark.parametrize("window", [1, 3, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_window_counts_keys(window, causal):
    # Equal keys and one-hot values: the output says which keys were seen.
    q_len, kv_len = 2, 6
    k = np.zeros((kv_len, 1, 1))
    v = np.eye(kv_len)[:, None]
    out, lse = dense_attention(np.zeros((q_len, 1, 1)), k, v, causal=causal, window=window)
    for i, position in enumerate([4, 5]):
        seen = [j for j in range(kv_len) if position - j < window and (j <= position or not causal)]
        np.testing.assert_allclose(out[i, 0], np.isin(np.arange(kv_len), seen) / len(seen), rtol=1e-15)
        assert lse[i, 0] == pytest.approx(math.log(len(seen)))
        if causal:
            assert len(seen) == window


def test_softcap_comes_before_the_mask_and_bounds_logits():
    q, k, v = random_qkv(2, 2, 5, 1, 1)
    out, lse = dense_attention(q, k, v, scale=3.0, causal=True, softcap=HALF_CAP)
    for i in range(2):
        logits = HALF_CAP * np.tanh(3.0 * (k[: 4 + i, 0] @ q[i, 0]) / HALF_CAP)
        weights = np.exp(logits)
        np.testing.assert_allclose(out[i, 0], weights @ v[: 4 + i, 0] / weights.sum(), atol=1e-14)
        assert lse[i, 0] == pytest.approx(math.log(weights.sum()))


def test_a_sink_is_one_more_logit_with_zero_value():
    q, k, v = random_qkv(3, 2, 5)
    sinks = np.array([-np.inf, -1.0, 0.0, 2.0])
    plain_out, plain_lse = dense_attention(q, k, v)
    out, lse = dense_attention(q, k, v, sinks=sinks)
    np.testing.assert_allclose(lse, np.logaddexp(plain_lse, sinks), atol=1e-14)
    np.testing.assert_allclose(out, plain_out * np.exp(plain_lse - lse)[..., None], atol=1e-14)


def test_no_keys_gives_zero_and_minus_infinity_or_the_sink():
    q, k, v = random_qkv(4, 2, 0)
    out, lse = dense_attention(q, k, v)
    assert not out.any()
    assert (lse == -np.inf).all()
    sinks = np.array([0.5, -3.0, 1e4, -1e5])
    out, lse = dense_attention(q, k, v, sinks=sinks)
    assert not out.any()
    np.testing.assert_array_equal(lse, np.broadcast_to(sinks, lse.shape))


def test_causal_queries_before_the_first_key_are_empty():
    q, k, v = random_qkv(5, 4, 2)
    out, lse = dense_attention(q, k, v, causal=True)
    assert not out[:2].any()
    assert (lse[:2] == -np.inf).all()
    assert np.isfinite(lse[2:]).all()


@pytest.mark.parametrize("offset", [1e4, -1e4, -6e4])
def test_huge_logits_stay_exact(offset):
    k = np.array([1.0, 2.0, 3.0])[:, None, None] + offset
    v = np.arange(6.0).reshape(3, 1, 2)
    out, lse = dense_attention(np.ones((1, 1, 1)), k, v, scale=1.0)
    weights = np.exp([-2.0, -1.0, 0.0])
    np.testing.assert_allclose(out[0, 0], weights @ v[:, 0] / weights.sum(), rtol=1e-12)
    assert lse[0, 0] == pytest.approx(offset + 3.0 + math.log(weights.sum()), abs=1e-10)


def test_infinite_and_nan_logits():
    q = np.ones((1, 1, 1))
    v = np.array([1.0, 2.0])[:, None, None]

    def run(*logits):
        out, lse = dense_attention(q, np.array(logits)[:, None, None], v, scale=1.0)
        return out[0, 0, 0], lse[0, 0]

    assert run(-np.inf, 3.0) == (2.0, 3.0)
    assert run(-np.inf, -np.inf) == (0.0, -np.inf)
    assert np.isnan(run(np.nan, 3.0)).all()
    assert np.isnan(run(np.inf, 3.0)[0])  # as softmax has it
    assert run(np.inf, 3.0)[1] == np.inf


def test_hidden_keys_are_not_looked_at():
    q, k, v = random_qkv(6, 1, 5)
    expected = dense_attention(q, k[3:], v[3:])
    k[:3], v[:3] = np.nan, np.inf
    for got, want in zip(dense_attention(q, k, v, window=2), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_tree_is_its_flattening():
    # Two roots; node 3 is empty; rows end at leaves, at an inner node and twice at the same node.
    parents, lens, row_to_node = [-1, 0, -1, 0, 1], [3, 2, 4, 0, 1], [4, 2, 0, 3, 4]
    paths = [[0, 1, 4], [2], [0], [0, 3], [0, 1, 4]]
    q_lens = [1, 2, 3, 1, 2]
    nodes = [random_qkv(10 + i, 1, n)[1:] for i, n in enumerate(lens)]
    k, v = (list(x) for x in zip(*nodes, strict=True))
    q = [random_qkv(20 + i, n, 0)[0] for i, n in enumerate(q_lens)]
    sinks = np.array([0.0, 1.0, -1.0, 2.0])
    options = {"scale": 0.9, "causal": True, "window": 4, "softcap": 2.0, "sinks": sinks}
    outs, lses = tree_attention(q, k, v, parents, row_to_node, **options)
    for row, path in enumerate(paths):
        out, lse = dense_attention(
            q[row], np.concatenate([k[i] for i in path]), np.concatenate([v[i] for i in path]), **options
        )
        np.testing.assert_array_equal(outs[row], out)
        np.testing.assert_array_equal(lses[row], lse)


def test_heads_that_cannot_be_grouped_are_refused():
    with pytest.raises(ValueError, match="multiple of num_kv_heads, got 3 and 2"):
        dense_attention(*random_qkv(7, 1, 2, num_q_heads=3, num_kv_heads=2))


def test_arguments_are_not_changed():
    arrays = random_qkv(8, 2, 3)
    copies = [x.copy() for x in arrays]
    dense_attention(*arrays, softcap=1.0, causal=True)
    for x, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(x, copy)

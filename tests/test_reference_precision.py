"""The reference's error against the oracle, next to the error of dense attention in the same dtype."""

import pytest
import torch
from reference_trees import CASES, draw, run_both


def dense_same_dtype(case, q, k, v, dtype, causal, window):
    """PyTorch's dense attention, row by row."""
    outs = []
    for row, last_node in enumerate(case.row_to_node):
        path, node = [], last_node
        while node >= 0:
            path, node = [node, *path], case.parents[node]
        row_q, row_k, row_v = (
            torch.cat(x).to(dtype).transpose(0, 1)
            for x in ([q[row]], [k[node] for node in path], [v[node] for node in path])
        )
        q_len, kv_len = row_q.shape[1], row_k.shape[1]
        distance = torch.arange(kv_len - q_len, kv_len)[:, None] - torch.arange(kv_len)
        mask = (distance >= 0) | (not causal)
        if window is not None:
            mask &= distance < window
        out = torch.nn.functional.scaled_dot_product_attention(row_q, row_k, row_v, mask, enable_gqa=True)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs).double()


def max_abs_logit(q, k, scale):
    """The largest sum of |q| |k| * scale over all pairs of a query and a key."""
    queries, keys = torch.cat(q).abs(), torch.cat(k).abs()
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    return torch.einsum("qhd,khd->qhk", queries, keys).max().item() * abs(scale)


def assert_within_budget(dtype, q, k, v, state, out, lse, dense):
    """The project's error budget: relative to dense attention of the same dtype, without magic numbers."""
    magnitude = max(1.0, max_abs_logit(q, k, q[0].shape[-1] ** -0.5))
    eps_lse = torch.finfo(state.lse.dtype).eps
    budget = (
        2 * (dense - out).abs().max()
        + torch.finfo(dtype).eps * out.abs().max()
        + eps_lse * magnitude * torch.cat(v).abs().max()
    )
    assert (state.out.double() - out).abs().max() <= budget
    # Rounding alone costs half an ulp of lse, which with many keys is log(kv_len) even if all logits are 0.
    assert (state.lse.double() - lse).abs().max() <= 4 * eps_lse * max(magnitude, lse.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharpness", [1.0, 30.0])
@pytest.mark.parametrize("masked", [False, True])
def test_the_error_budget_is_met(dtype, sharpness, masked):
    case = CASES["several roots, uneven groups"]._replace(kv_lens=[700, 90, 33, 5, 130, 64])
    options = {"causal": masked, "window": 200 if masked else None}
    for seed in range(3):
        q, k, v = draw(case, seed, (6, 2), (16, 24), dtype, sharpness)
        state, out, lse = run_both(case, q, k, v, dtype=dtype, **options)
        assert state.out.dtype == dtype
        dense = dense_same_dtype(case, q, k, v, dtype, **options)
        assert_within_budget(dtype, q, k, v, state, out, lse, dense)

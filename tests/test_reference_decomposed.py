"""Trees in blocks of segments against the oracle, within the error budget."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from hydragen_reference.decomposed import Block, tree_attention
from hydragen_reference.oracle import tree_attention as oracle_attention


class Case(NamedTuple):
    """A batch of rows on a tree: lengths as lists, as a reader would write them down."""

    parents: list[int]
    kv_lens: list[int]
    row_to_node: list[int]
    q_lens: list[int]


CASES = {
    "one row": Case([-1], [5], [0], [1]),
    "two levels": Case([-1, 0, 0, 0, 0], [9, 3, 3, 3, 3], [1, 2, 3, 4], [1] * 4),
    "nothing shared": Case([-1, -1, -1], [4, 1, 6], [2, 0, 1], [2, 1, 3]),
    "several roots, uneven groups": Case(
        [-1, -1, 0, 0, 0, 1], [7, 4, 2, 5, 1, 3], [5, 3, 2, 4], [1, 2, 1, 2]
    ),
    "deep": Case([-1, 0, 1, 2, 3, 3], [3, 1, 2, 4, 1, 2], [4, 5, 5], [1, 1, 2]),
    "empty segments": Case([-1, 0, 0, -1, 3], [4, 0, 3, 0, 0], [1, 2, 4, 3], [1, 1, 2, 1]),
    "inner rows, repeated rows": Case([-1, 0, 0, 1], [6, 2, 3, 1], [0, 3, 0, 2, 1, 3], [1, 2, 1, 1, 3, 1]),
    "more queries than keys": Case([-1, 0, 0], [1, 1, 0], [1, 2, 0], [4, 3, 2]),
}


def draw(case, seed=0, heads=(4, 2), head_dims=(8, 8), dtype=torch.float64, sharpness=1.0):
    """Rounded float64 copies of q per row, and of k and v per node."""
    generator = torch.Generator().manual_seed(seed)

    def normal(lens, num_heads, dim, factor=1.0):
        drawn = [
            factor * torch.randn(n, num_heads, dim, generator=generator, dtype=torch.float64) for n in lens
        ]
        return [x.to(dtype).double() for x in drawn]

    q = normal(case.q_lens, heads[0], head_dims[0], sharpness)
    k, v = (normal(case.kv_lens, heads[1], dim) for dim in head_dims)
    return q, k, v


def structure(case):
    """Where each node starts on its path, which packed tokens attend to it, and every token's position."""
    starts = [0] * len(case.parents)
    for node, parent in enumerate(case.parents):
        if parent >= 0:
            starts[node] = starts[parent] + case.kv_lens[parent]
    tokens = [[] for _ in case.parents]
    q_pos = []
    for last_node, q_len in zip(case.row_to_node, case.q_lens, strict=True):
        row_tokens = range(len(q_pos), len(q_pos) + q_len)
        path_len = starts[last_node] + case.kv_lens[last_node]
        q_pos += range(path_len - q_len, path_len)
        node = last_node
        while node >= 0:
            tokens[node] += row_tokens
            node = case.parents[node]
    return starts, tokens, torch.tensor(q_pos, dtype=torch.int64)


def blocks_of(case, k, v, groups, dtype):
    """One block per group of nodes: padded with NaN to two keys more than needed, and tokens with -1."""
    starts, tokens, _ = structure(case)
    blocks = []
    for nodes in groups:
        kv_lens = [case.kv_lens[node] for node in nodes]
        padded = [
            torch.full((len(nodes), max(kv_lens) + 2, *x[0].shape[1:]), torch.nan, dtype=dtype)
            for x in (k, v)
        ]
        for x, source in zip(padded, (k, v), strict=True):
            for i, node in enumerate(nodes):
                x[i, : kv_lens[i]] = source[node]
        block_tokens = torch.full((len(nodes), max(len(tokens[node]) for node in nodes)), -1)
        for i, node in enumerate(nodes):
            block_tokens[i, : len(tokens[node])] = torch.tensor(tokens[node])
        k_start = torch.tensor([starts[node] for node in nodes])
        blocks.append(Block(*padded, torch.tensor(kv_lens), block_tokens, k_start))
    return blocks


def by_node(case):
    return [[node] for node in range(len(case.parents))]


def by_depth(case):
    depths = []
    for parent in case.parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return [[i for i, d in enumerate(depths) if d == depth] for depth in range(max(depths) + 1)]


def run_both(case, q, k, v, groups=by_depth, dtype=torch.float64, **options):
    blocks = blocks_of(case, k, v, groups(case), dtype)
    state = tree_attention(torch.cat(q).to(dtype), blocks, q_pos=structure(case)[2], **options)
    if "sinks" in options:
        options["sinks"] = options["sinks"].double().numpy()
    arrays = ([x.numpy() for x in tensors] for tensors in (q, k, v))
    out, lse = oracle_attention(*arrays, case.parents, case.row_to_node, **options)
    return state, torch.from_numpy(np.concatenate(out)), torch.from_numpy(np.concatenate(lse))


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


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("groups", [by_node, by_depth])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": 3},
        {"causal": True, "window": 1, "softcap": 0.9},
        {
            "causal": True,
            "window": 5,
            "softcap": 3.0,
            "scale": -0.6,
            "sinks": torch.tensor([0.0, 2.0, -1.0, 9.0]),
        },
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_trees_agree_with_the_oracle(case, groups, options):
    state, out, lse = run_both(case, *draw(case), groups, **options)
    torch.testing.assert_close(state.out, out, rtol=0, atol=1e-13)
    torch.testing.assert_close(state.lse, lse, rtol=0, atol=1e-13)


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


def test_blocks_in_order_need_no_tokens():
    q = torch.randn(6, 4, 8, dtype=torch.float64)
    prefix, suffix = torch.randn(2, 1, 5, 2, 8, dtype=torch.float64), torch.randn(2, 3, 4, 2, 8).double()
    tokens = torch.arange(6)
    expected = tree_attention(q, [Block(*prefix), Block(*suffix)])
    listed = [Block(*prefix, tokens=tokens[None]), Block(*suffix, tokens=tokens.view(3, 2))]
    padded = [
        Block(*prefix, tokens=torch.nn.functional.pad(tokens[None], (0, 1), value=-1)),
        Block(*suffix, tokens=torch.nn.functional.pad(tokens.view(3, 2), (1, 0), value=-1)),
    ]
    for blocks in (listed, listed[::-1], padded, [listed[0], padded[1]], [padded[0], listed[1]]):
        state = tree_attention(q, blocks)
        torch.testing.assert_close(state.out, expected.out, rtol=0, atol=1e-14)
        torch.testing.assert_close(state.lse, expected.lse, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="multiple of its 4 segments as query tokens, got 6"):
        tree_attention(q, [Block(*torch.randn(2, 4, 1, 2, 8))])


@pytest.mark.parametrize("sinks", [None, torch.tensor([1.0, -70_000.0])])
def test_tokens_without_keys(sinks):
    q = torch.randn(3, 2, 4)
    k, v = torch.full((2, 1, 5, 1, 4), torch.nan)
    for blocks in (
        [],
        [Block(k, v, torch.tensor([0]))],
        [Block(k[:, :0], v[:, :0])],
        [Block(k[:0], v[:0], tokens=torch.zeros(0, 2, dtype=torch.int64))],
        [Block(k, v, tokens=torch.tensor([[-1, -1]]))],
    ):
        state = tree_attention(q, blocks, sinks=sinks)
        assert not state.out.any()
        expected = torch.full((3, 2), -torch.inf) if sinks is None else sinks.expand(3, 2)
        assert torch.equal(state.lse, expected)


@pytest.mark.parametrize("tokens", [None, torch.zeros(1, 0, dtype=torch.int64), torch.full((1, 2), -1)])
def test_no_tokens_at_all(tokens):
    k, v = torch.randn(1, 3, 2, 4), torch.randn(1, 3, 2, 5)
    block = Block(k, v, torch.tensor([2]), tokens)
    state = tree_attention(torch.zeros(0, 4, 4), [block], sinks=torch.zeros(4))
    assert state.out.shape == (0, 4, 5)
    assert state.lse.shape == (0, 4)


def test_a_sink_counts_once_however_many_blocks_there_are():
    q, sinks = torch.zeros(1, 1, 1), torch.zeros(1)
    keys = torch.zeros(1, 1, 1, 1)
    for count in (1, 2, 5):
        state = tree_attention(q, [Block(keys, keys + 1.0)] * count, sinks=sinks)
        torch.testing.assert_close(state.out.item(), count / (count + 1))
        torch.testing.assert_close(state.lse.item(), math.log(count + 1))


def test_nan_reaches_only_the_tokens_that_attend_to_it():
    case = CASES["several roots, uneven groups"]
    q, k, v = draw(case)
    clean = tree_attention(torch.cat(q), blocks_of(case, k, v, by_depth(case), torch.float64))
    k[3][:] = torch.nan  # row 1 ends here
    inputs = [torch.cat(q).requires_grad_(), blocks_of(case, k, v, by_depth(case), torch.float64)]
    state = tree_attention(*inputs)
    attended = torch.isin(torch.arange(6), torch.tensor(structure(case)[1][3]))
    assert state.out[attended].isnan().all()
    assert state.lse[attended].isnan().all()
    assert torch.equal(state.out[~attended], clean.out[~attended])
    assert torch.equal(state.lse[~attended], clean.lse[~attended])
    (state.out.sum() + state.lse.sum()).backward()
    assert inputs[0].grad[~attended].isfinite().all()


def test_gradients_through_a_tree_with_empty_rows():
    case = Case([-1, 0, 0, -1], [2, 0, 3, 0], [2, 3, 1], [2, 1, 1])
    q, k, v = draw(case, heads=(2, 1), head_dims=(2, 2))
    sinks = torch.tensor([0.5, -0.5], dtype=torch.float64)
    q_pos = structure(case)[2]

    def run(q, sinks, *kv, use_sinks=True):
        blocks = blocks_of(case, kv[:4], kv[4:], by_depth(case), torch.float64)
        state = tree_attention(q, blocks, q_pos=q_pos, causal=True, sinks=sinks if use_sinks else None)
        return state.out, torch.where(state.lse == -torch.inf, 0.0, state.lse)

    inputs = [x.requires_grad_() for x in (torch.cat(q), sinks, *k, *v)]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradcheck(
        lambda q, *kv: run(q, None, *kv, use_sinks=False), [inputs[0], *inputs[2:]]
    )


def test_every_masked_row_leaves_the_gradients_of_others_alone():
    # One row sees nothing at all: it must not turn the gradient of the shared keys into NaN.
    q, k, v = (torch.randn(s, requires_grad=True) for s in ((2, 1, 4), (1, 3, 1, 4), (1, 3, 1, 4)))
    state = tree_attention(q, [Block(k, v)], q_pos=torch.tensor([-1, 2]), causal=True)
    assert torch.equal(state.out[0], torch.zeros(1, 4))
    (state.out.sum() + state.lse[1].sum()).backward()
    assert not q.grad[0].any()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
        assert x.grad.any()


def test_positions_are_needed_for_masks():
    q, keys = torch.randn(1, 1, 2), torch.randn(1, 1, 1, 2)
    with pytest.raises(ValueError, match="q_pos must be given"):
        tree_attention(q, [Block(keys, keys)], causal=True)

"""Trees in blocks of segments against the oracle."""

import math

import pytest
import torch
from reference_trees import CASES, Case, blocks_of, by_depth, by_node, draw, run_both, structure
from torch.autograd import forward_ad

from hydragen_reference.decomposed import Block, tree_attention
from hydragen_reference.segment import KEYS_PER_CHUNK


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


def tree_of_two_depths(seed=0):
    """q, k and v of a root of more than one chunk and of what two of three tokens have below it."""
    shapes = (3, 2, 4), (1, KEYS_PER_CHUNK + 3, 1, 4), (1, 5, 1, 4)
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)


def attend_to_both(q, root, below):
    blocks = [Block(root, root.sin()), Block(below, below.cos(), tokens=torch.tensor([[2, 0]]))]
    return torch.cat([x.flatten() for x in tree_attention(q, blocks)])


def test_forward_mode_equals_backward_mode():
    inputs = tree_of_two_depths()
    tangents = tree_of_two_depths(seed=1)
    leaves = [x.clone().requires_grad_() for x in inputs]
    for which in range(3):
        one = [tangent * (i == which) for i, tangent in enumerate(tangents)]
        out, found = torch.func.jvp(attend_to_both, inputs, tuple(one))
        again = attend_to_both(*leaves)
        torch.testing.assert_close(again, out)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
        grads = torch.autograd.grad(again @ weights, leaves)
        torch.testing.assert_close(weights @ found, (grads[which] * one[which]).sum())
        # tensors that want gradients may have tangents as well
        with forward_ad.dual_level():
            dual = attend_to_both(*map(forward_ad.make_dual, leaves, one))
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, found)
        assert torch.equal(again, attend_to_both(*leaves))
    for found, expected in zip(
        torch.func.grad(lambda *x: attend_to_both(*x) @ weights, (0, 1, 2))(*inputs), grads, strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("which", range(3))
def test_mapped_by_vmap_is_one_after_another(which):
    inputs = tree_of_two_depths()
    several = torch.stack([tree_of_two_depths(seed)[which] for seed in (1, 2)])

    def attend_with(x):
        return attend_to_both(*inputs[:which], x, *inputs[which + 1 :])

    torch.testing.assert_close(torch.vmap(attend_with)(several), torch.stack([*map(attend_with, several)]))


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


def test_nothing_waits_for_the_device():
    # Tensors without data: whatever reads one of their numbers raises.
    q = torch.randn(6, 4, 8, device="meta", requires_grad=True)
    k, v = torch.randn(2, 2, 5, 2, 8, device="meta")
    lens, tokens = torch.ones(2, dtype=torch.int64, device="meta"), torch.ones(2, 4, device="meta").long()
    blocks = [Block(k, v), Block(k, v, lens), Block(k, v, lens, tokens, k_start=lens)]
    options = {"q_pos": torch.ones(6, device="meta").long(), "causal": True, "window": 3, "softcap": 1.0}
    state = tree_attention(q, blocks, **options, sinks=torch.ones(4, device="meta"))
    (state.out.sum() + state.lse.sum()).backward()
    assert state.out.shape == q.grad.shape == (6, 4, 8)


def test_positions_are_needed_for_masks():
    q, keys = torch.randn(1, 1, 2), torch.randn(1, 1, 1, 2)
    with pytest.raises(ValueError, match="q_pos must be given"):
        tree_attention(q, [Block(keys, keys)], causal=True)

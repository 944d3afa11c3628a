"""The merge algebra of the reference, including what other implementations got wrong."""

import itertools
import math

import numpy as np
import pytest
import torch

from hydragen_reference.decomposed import State, merge_states
from hydragen_reference.oracle import dense_attention


def random_state(seed, shape=(3, 2), head_dim=4, lse_scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(*shape, head_dim, generator=generator, dtype=torch.float64)
    return State(out, lse_scale * torch.randn(*shape, generator=generator, dtype=torch.float64))


def empty_state(shape=(3, 2), head_dim=4):
    out = torch.zeros(*shape, head_dim, dtype=torch.float64)
    return State(out, torch.full(shape, -torch.inf, dtype=torch.float64))


def assert_equal(got, want, tolerance=0.0):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=tolerance, equal_nan=True)


def scalar_state(out, lse):
    return State(torch.tensor([[float(out)]]), torch.tensor([float(lse)]))


def test_merging_pieces_gives_the_attention_over_all_of_them():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(n, 2, 129)) for n in (3, 30, 30))
    pieces = [dense_attention(q, k[a:b], v[a:b]) for a, b in itertools.pairwise([0, 1, 1, 25, 30])]
    states = [State(torch.from_numpy(out), torch.from_numpy(lse)) for out, lse in pieces]
    whole = State(*(torch.from_numpy(x) for x in dense_attention(q, k, v)))
    assert_equal(merge_states(states), whole, 1e-13)


def test_lse_is_a_natural_logarithm():
    merged = merge_states([scalar_state(0.0, math.log(3.0)), scalar_state(4.0, 0.0)])
    torch.testing.assert_close(merged.lse, torch.tensor([math.log(4.0)]))
    torch.testing.assert_close(merged.out, torch.tensor([[1.0]]))


def test_merge_commutes_and_associates():
    a, b, c = (random_state(seed) for seed in range(3))
    assert_equal(merge_states([a, b]), merge_states([b, a]))
    flat = merge_states([a, b, c])
    assert_equal(merge_states([merge_states([a, b]), c]), flat, 1e-14)
    assert_equal(merge_states([a, merge_states([b, c])]), flat, 1e-14)


def test_the_empty_state_is_the_identity():
    state, empty = random_state(0), empty_state()
    for states in ([state], [state, empty], [empty, state], [empty, state, empty]):
        assert_equal(merge_states(states), state, 1e-15)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_empty_states_merge_to_the_empty_state(count):
    assert_equal(merge_states([empty_state()] * count), empty_state())


def test_one_empty_row_leaves_the_others_alone():
    # 64 rows of which 1 and 10 are empty in one state, and 10 in the other as well.
    a, b = random_state(1, (64, 8)), random_state(2, (64, 8))
    alone = merge_states([a, b])
    for state, rows in ((a, [1, 10]), (b, [10])):
        state.out[rows], state.lse[rows] = 0.0, -torch.inf
    merged = merge_states([a, b])
    others = [i for i in range(64) if i not in (1, 10)]
    assert_equal([x[others] for x in merged], [x[others] for x in alone])
    assert_equal([x[1] for x in merged], [x[1] for x in b], 1e-15)
    assert_equal([x[10] for x in merged], [x[10] for x in empty_state((64, 8))])


@pytest.mark.parametrize("lse", [1e4, -1e4, -6e4, -1e30, 1e30])
def test_extreme_lse(lse):
    merged = merge_states([scalar_state(1.0, lse), scalar_state(3.0, lse), scalar_state(0.0, -torch.inf)])
    torch.testing.assert_close(merged.out, torch.tensor([[2.0]]))
    torch.testing.assert_close(merged.lse, torch.tensor([lse + math.log(2.0)]))


def test_far_apart_states():
    merged = merge_states([scalar_state(1.0, 1e4), scalar_state(3.0, -1e4)])
    assert_equal(merged, scalar_state(1.0, 1e4))


def test_nan_propagates_only_within_its_row_and_head():
    a, b = random_state(3), random_state(4)
    clean = merge_states([a, b])
    a.lse[1, 0] = torch.nan
    merged = merge_states([a, b])
    assert merged.lse[1, 0].isnan()
    assert merged.out[1, 0].isnan().all()
    keep = torch.ones(3, 2, dtype=torch.bool)
    keep[1, 0] = False
    assert_equal([x[keep] for x in merged], [x[keep] for x in clean])
    b.out[2, 1, 0] = torch.nan
    assert merge_states([a, b]).out[2, 1, 0].isnan()


def test_plus_infinity_outweighs_all_else():
    infinite = scalar_state(1.0, torch.inf)
    for others in ([], [scalar_state(5.0, 1e30)], [scalar_state(0.0, -torch.inf)]):
        assert_equal(merge_states([infinite, *others]), infinite)
        assert_equal(merge_states([*others, infinite]), infinite)
    assert_equal(merge_states([infinite, scalar_state(3.0, torch.inf)]), scalar_state(2.0, torch.inf))


def test_strides_do_not_matter():
    a, b = random_state(5, (7, 3), 5), random_state(6, (7, 3), 5)
    turned = State(a.out.permute(2, 1, 0).contiguous().permute(2, 1, 0), a.lse.t().contiguous().t())
    padded = State(torch.nn.functional.pad(b.out, (0, 3), value=torch.nan)[..., :5], b.lse)
    assert not turned.lse.is_contiguous()
    assert_equal(merge_states([turned, padded]), merge_states([a, b]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_arguments_are_kept(dtype):
    states = [State(s.out.to(dtype), s.lse.float()) for s in (random_state(7), random_state(8))]
    copies = [State(*(x.clone() for x in state)) for state in states]
    merged = merge_states(states)
    assert merged.out.dtype == dtype
    assert merged.lse.dtype == torch.float32
    for state, copy in zip(states, copies, strict=True):
        assert_equal(state, copy)


def test_gradients_reach_out_and_lse():
    a, b = random_state(9), random_state(10)
    b.out[0], b.lse[0] = 0.0, -torch.inf

    def merge(out_a, lse_a, out_b, finite_lse_b):
        lse_b = torch.cat([b.lse[:1], finite_lse_b])  # finite differences cannot step from -inf
        return tuple(merge_states([State(out_a, lse_a), State(out_b, lse_b), empty_state()]))

    inputs = [x.clone().requires_grad_() for x in (a.out, a.lse, b.out, b.lse[1:])]
    assert torch.autograd.gradcheck(merge, inputs)
    assert torch.autograd.gradgradcheck(merge, inputs)


def test_equal_lse_have_the_right_gradient():
    lse = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    values = torch.tensor([1.0, 5.0], dtype=torch.float64)

    def merge(lse):
        return tuple(merge_states([State(values[i].view(1, 1), lse[i].view(1)) for i in range(2)]))

    assert torch.autograd.gradcheck(merge, [lse])


def test_empty_rows_have_finite_gradients():
    states = [State(*(x.requires_grad_() for x in empty_state())) for _ in range(2)]
    merged = merge_states(states)
    (merged.out.sum() + merged.lse.clamp(min=-1.0).sum()).backward()
    for state in states:
        assert state.out.grad.isfinite().all()
        assert not state.lse.grad.any()


def test_nothing_to_merge_is_refused():
    with pytest.raises(ValueError, match="at least one state"):
        merge_states([])

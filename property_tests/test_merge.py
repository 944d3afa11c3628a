"""merge_states is associative and commutative up to rounding, and the empty state is its identity."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hydragen
from hydragen import AttentionState
from hydragen_reference import decomposed

EPS = torch.finfo(torch.float32).eps
MERGES = {"hydragen": hydragen.merge_states, "reference": decomposed.merge_states}


@st.composite
def states(draw: st.DrawFn, min_size: int = 1, max_size: int = 6) -> list[AttentionState]:
    """States of equal shapes: empty ones, lopsided ones, and ones whose lse has strides of its own."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 2, 5, 33])))
    sizes = draw(
        st.lists(
            st.sampled_from([0.0, 1.0, 100.0, 1e4, 7e4, -math.inf]), min_size=min_size, max_size=max_size
        )
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    drawn = []
    for size in sizes:
        out = torch.from_numpy(rng.standard_normal(shape)).float()
        lse = torch.from_numpy(
            rng.choice([-1.0, 1.0], shape[:2]) * size + rng.standard_normal(shape[:2])
        ).float()
        some_empty = torch.from_numpy(rng.random(shape[:2]) < 0.2) if size else torch.zeros(shape[:2]).bool()
        lse = lse.masked_fill(some_empty | torch.tensor(math.isinf(size)), -math.inf)
        out = out.masked_fill((lse == -math.inf)[..., None], 0.0)
        if rng.random() < 0.3:
            lse = lse.T.contiguous().T
        drawn.append(AttentionState(out, lse))
    return drawn


def expected(merged: list[AttentionState]) -> tuple[np.ndarray, np.ndarray]:
    """The definition, in float64: out = Σ exp(lse_i - lse) out_i, lse = log Σ exp(lse_i)."""
    outs = np.stack([state.out.double().numpy() for state in merged])
    lses = np.stack([state.lse.double().numpy() for state in merged])
    lse = np.logaddexp.reduce(lses, axis=0)
    weights = np.exp(lses - np.where(np.isinf(lse), 0.0, lse))
    return (weights[..., None] * outs).sum(0), lse


def assert_merged(result: AttentionState, merged: list[AttentionState], steps: int = 1) -> None:
    """Each step rounds lse to float32 and the weights by as much: in eps, of the largest lse."""
    __tracebackhide__ = True
    out, lse = expected(merged)
    largest = max(
        [1.0, *(float(s.lse[s.lse.isfinite()].abs().max()) for s in merged if s.lse.isfinite().any())]
    )
    limit = 4 * steps * EPS * largest
    largest_out = max(float(state.out.abs().max()) for state in merged)
    assert result.lse.dtype == result.out.dtype == torch.float32
    np.testing.assert_array_equal(np.isneginf(result.lse.numpy()), np.isneginf(lse))
    np.testing.assert_allclose(result.lse.numpy(), lse, rtol=0, atol=limit)
    np.testing.assert_allclose(result.out.numpy(), out, rtol=0, atol=limit * largest_out)


@pytest.fixture(params=MERGES.values(), ids=MERGES, scope="module")
def merge(request: pytest.FixtureRequest) -> object:
    return request.param


@given(states())
def test_matches_the_definition(merge, drawn) -> None:
    assert_merged(AttentionState(*merge(drawn)), drawn)


@given(states(min_size=2), st.integers(0, 10**6))
def test_merging_is_associative(merge, drawn, cut) -> None:
    cut = 1 + cut % (len(drawn) - 1)
    parts = [merge(drawn[:cut]), merge(drawn[cut:])]
    assert_merged(AttentionState(*merge(parts)), drawn, steps=2)


@given(states(min_size=2))
def test_merging_is_commutative(merge, drawn) -> None:
    assert_merged(AttentionState(*merge(drawn[::-1])), drawn)


@given(states(), st.integers(0, 6))
def test_the_empty_state_is_the_identity(merge, drawn, place) -> None:
    empty = AttentionState(torch.zeros_like(drawn[0].out), torch.full_like(drawn[0].lse, -math.inf))
    assert_merged(AttentionState(*merge([*drawn[:place], empty, *drawn[place:]])), drawn)


@given(st.integers(1, 4), st.integers(1, 4))
def test_empty_states_alone_give_the_empty_state(merge, count, head_dim) -> None:
    empty = AttentionState(torch.zeros(2, 3, head_dim), torch.full((2, 3), -math.inf))
    out, lse = merge([empty] * count)
    assert torch.equal(out, empty.out)
    assert torch.equal(lse, empty.lse)

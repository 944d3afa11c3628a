"""merge_states: attention over pieces makes attention over the whole."""
# ruff: noqa: E501 - the table of errors has one case per line

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import hydragen
from hydragen import AttentionState, merge_states


def attend(q: Tensor, k: Tensor, v: Tensor) -> AttentionState:
    """Softmax attention of q [tokens, heads, dim] over k, v [keys, heads, dim] in their dtype."""
    logits = torch.einsum("thd,khd->thk", q, k)
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp() if k.shape[0] else logits
    return AttentionState(torch.einsum("thk,khd->thd", weights, v), lse)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def empty_like(state: AttentionState) -> AttentionState:
    return AttentionState(torch.zeros_like(state.out), torch.full_like(state.lse, -torch.inf))


def close(a: AttentionState, b: AttentionState, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a.out, b.out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a.lse, b.lse, rtol=tolerance, atol=tolerance)


@pytest.fixture
def pieces() -> list[AttentionState]:
    q, k, v = 3 * normal(5, 4, 8), normal(40, 4, 8, seed=1), normal(40, 4, 8, seed=2)
    cuts = [0, 1, 1, 30, 40]
    return [attend(q, k[a:b], v[a:b]) for a, b in pairwise(cuts)]


def test_pieces_make_the_whole(pieces: list[AttentionState]) -> None:
    q, k, v = 3 * normal(5, 4, 8), normal(40, 4, 8, seed=1), normal(40, 4, 8, seed=2)
    close(merge_states(pieces), attend(q, k, v))


def test_associative_and_commutative(pieces: list[AttentionState]) -> None:
    whole = merge_states(pieces)
    close(merge_states(pieces[::-1]), whole)
    close(merge_states([pieces[0], merge_states(pieces[1:])]), whole)
    close(merge_states([merge_states(pieces[:2]), merge_states(pieces[2:])]), whole)


def test_the_empty_state_is_the_identity(pieces: list[AttentionState]) -> None:
    state = pieces[2]
    for around in ([state, empty_like(state)], [empty_like(state), state], [state]):
        merged = merge_states(around)
        assert torch.equal(merged.out, state.out)
        assert torch.equal(merged.lse, state.lse)
    nothing = merge_states([empty_like(state)] * 3)
    assert torch.equal(nothing.out, torch.zeros_like(state.out))
    assert torch.equal(nothing.lse, torch.full_like(state.lse, -torch.inf))


def test_closed_form() -> None:
    """Weights of 3 to 1, whatever the size of the logits."""
    for shift in (0.0, -6e4, 1e4, -1e30, 1e30):
        ones = torch.ones(1, 1, 2, dtype=torch.float64)
        a = AttentionState(ones, torch.full((1, 1), shift, dtype=torch.float64) + math.log(3))
        b = AttentionState(5 * ones, torch.full((1, 1), shift, dtype=torch.float64))
        merged = merge_states([a, b])
        if abs(shift) < 1e20:
            torch.testing.assert_close(merged.out, 2 * ones, rtol=1e-9, atol=0)
            torch.testing.assert_close(merged.lse, b.lse + math.log(4), rtol=1e-12, atol=1e-12)
        assert merged.out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_out_is_merged_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    states = [
        AttentionState(
            torch.randn(64, 4, 8, generator=generator).to(dtype), torch.randn(64, 4, generator=generator)
        )
        for _ in range(7)
    ]
    merged = merge_states(states)
    assert merged.out.dtype == dtype
    assert merged.lse.dtype == torch.float32
    exact = merge_states([AttentionState(s.out.double(), s.lse.double()) for s in states])
    # one rounding, of the result
    torch.testing.assert_close(merged.out, exact.out.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_tuples_are_states_and_nothing_is_modified(pieces: list[AttentionState]) -> None:
    before = [tuple(x.clone() for x in state) for state in pieces]
    close(merge_states([tuple(state) for state in pieces]), merge_states(pieces))
    for state, copy in zip(pieces, before, strict=True):
        assert torch.equal(state.out, copy[0])
        assert torch.equal(state.lse, copy[1])


def test_any_leading_dimensions() -> None:
    for shape in ((), (3,), (2, 3, 5)):
        state = AttentionState(normal(*shape, 4), normal(*shape, seed=1))
        merged = merge_states([state, state])
        assert merged.out.shape == (*shape, 4)
        torch.testing.assert_close(merged.lse, state.lse + math.log(2))


def test_attention_by_pieces(backend: str, device: torch.device) -> None:
    """What a user does by hand: attention over prefix and suffix apart, merged."""
    generator = torch.Generator().manual_seed(0)
    q, p, s = (
        torch.randn(shape, generator=generator).to(device)
        for shape in ((3, 1, 4, 16), (1, 20, 2, 16), (3, 5, 2, 16))
    )
    whole = hydragen.attention(q, [(p, p), (s, s)], return_lse=True, backend=backend)
    parts = [hydragen.attention(q, [(x, x)], return_lse=True, backend=backend) for x in (p, s)]
    merged = merge_states(parts)
    torch.testing.assert_close(merged.out, whole.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged.lse, whole.lse, rtol=1e-5, atol=1e-6)


def test_gradients_of_out_and_lse(pieces: list[AttentionState]) -> None:
    tensors = [x[:2].clone().requires_grad_() for state in (pieces[0], pieces[2], pieces[3]) for x in state]

    def merged(*flat: Tensor) -> AttentionState:
        return merge_states(list(zip(flat[::2], flat[1::2], strict=True)))

    assert torch.autograd.gradcheck(merged, tensors)


def test_gradients_beside_an_empty_state() -> None:
    out, lse = (
        normal(2, 3).requires_grad_(),
        torch.tensor([0.5, -torch.inf], dtype=torch.float64).requires_grad_(),
    )
    empty = (torch.zeros(2, 3, dtype=torch.float64), torch.full((2,), -torch.inf, dtype=torch.float64))
    merged = merge_states([(out, lse), empty])
    grads = torch.autograd.grad(merged.out.sum() + merged.lse[0], [out, lse])
    assert all(grad.isfinite().all() for grad in grads)


GOOD = (torch.zeros(2, 3, 4), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("states", "error", "message"),
    [
        ([], ValueError, "states must have at least one state, got none; pass"),
        (None, TypeError, "states must be a sequence of AttentionState, got NoneType; pass"),
        (GOOD[0], TypeError, "states must be a sequence of AttentionState, got Tensor; pass"),
        (AttentionState(*GOOD), TypeError, r"states\[0\] must be an AttentionState \(out, lse\) of tensors, got Tensor; "),
        ([GOOD[0]], TypeError, r"states\[0\] must be an AttentionState \(out, lse\) of tensors, got Tensor; "),
        ([GOOD, (GOOD[0], None)], TypeError, r"states\[1\] must be an AttentionState .* got tuple; "),
        ([(GOOD[0].long(), GOOD[1])], TypeError, r"states\[0\] must have a floating-point out .* got torch.int64 .*; "),
        ([(GOOD[0], GOOD[1].half())], TypeError, r"states\[0\] must have .* float32 or float64 lse, .* torch.float16; "),
        ([(GOOD[0], GOOD[1].T)], ValueError, r"states\[0\].lse must be shaped like out .* \[2, 3\], got \[3, 2\]; "),
        ([(GOOD[0], GOOD[1].to("meta"))], ValueError, r"states\[0\].lse must be on the device of out, cpu, got meta; "),
        ([GOOD, tuple(x[:1] for x in GOOD)], ValueError, r"states\[1\].out must match states\[0\], \[2, 3, 4\] .* got \[1, 3, 4\]"),
        ([GOOD, (GOOD[0].half(), GOOD[1])], ValueError, r"states\[1\].out must match states\[0\], .* got .* torch.float16"),
        ([GOOD, (GOOD[0], GOOD[1].double())], ValueError, r"states\[1\].lse must match states\[0\], .* torch.float64"),
    ],
)  # fmt: skip
def test_wrong_arguments(states: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        merge_states(states)

"""Gradients flow through `out` and `lse` on the reference; the Triton path says that it has none yet."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hydragen
from hydragen import PackedKV, PrefixTree

TREE = PrefixTree.from_parents([-1, 0, 0, 1], row_to_node=[3, 2, 1, 2])


def normal(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.requires_grad_()


def packed(**options: Any) -> tuple[Callable[..., Any], list[Tensor]]:
    """A tree of four nodes, one of them empty, rows of 2, 1, 2 and 1 queries; inputs q, k, v and sinks."""
    inputs = [normal(6, 4, 3), normal(9, 2, 3, seed=1), normal(9, 2, 2, seed=2)]
    if options.pop("sinks", False):
        inputs.append(normal(4, seed=3))

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Any:
        return hydragen.attention(
            q,
            PackedKV(k, v, [0, 4, 7, 7, 9]),
            tree=TREE,
            cu_seqlens_q=[0, 2, 3, 5, 6],
            sinks=sinks,
            backend="reference",
            **options,
        )

    return attend, inputs


def levels(**options: Any) -> tuple[Callable[..., Any], list[Tensor]]:
    """A prefix and two suffixes, the second of which is not full."""
    inputs = [
        normal(2, 2, 2, 3),
        *(normal(n, length, 1, 3, seed=n + length) for n, length in ((1, 4), (2, 3))),
    ]

    def attend(q: Tensor, prefix: Tensor, suffix: Tensor) -> Any:
        kv = [(prefix, prefix), (suffix, suffix)]
        return hydragen.attention(q, kv, kv_lens=[None, [3, 1]], backend="reference", **options)

    return attend, inputs


CASES = {
    "packed": packed(return_lse=True),
    "out alone": packed(),
    "levels": levels(return_lse=True),
    "masks": packed(return_lse=True, causal=True, window=3),
    "softcap and scale": packed(return_lse=True, softcap=0.7, scale=-0.8),
    "sinks": packed(return_lse=True, sinks=True),
    "everything": packed(return_lse=True, sinks=True, causal=True, window=4, softcap=2.0),
    "batch invariant": packed(return_lse=True, batch_invariant=True, causal=True, sinks=True),
}


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    attend, inputs = CASES[name]
    # lse of a row without keys is -inf, and constant
    outputs = attend(*inputs)
    finite = [x.isfinite() for x in (outputs if isinstance(outputs, tuple) else (outputs,))]

    def finite_outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        again = attend(*tensors)
        flat = again if isinstance(again, tuple) else (again,)
        return tuple(x[keep] for x, keep in zip(flat, finite, strict=True))

    assert torch.autograd.gradcheck(finite_outputs, inputs)
    forward = {"check_forward_ad": True, "check_backward_ad": False}
    assert torch.autograd.gradcheck(finite_outputs, inputs, fast_mode=True, **forward)


def test_second_derivatives() -> None:
    attend, inputs = CASES["levels"]
    assert torch.autograd.gradgradcheck(lambda *tensors: tuple(attend(*tensors)), inputs)


# Known from elsewhere: a loss that uses lse, whose gradient was discarded.
def test_the_gradient_of_lse_is_not_discarded() -> None:
    attend, inputs = CASES["packed"]
    state = attend(*inputs)
    grads = torch.autograd.grad(state.lse.sum(), inputs, allow_unused=True)
    assert grads[0].abs().max() > 0.01
    assert grads[1].abs().max() > 0.01
    # d lse / dk sums to q weighted by 1: the weights of a query's keys make up the whole
    q = inputs[0].detach()
    per_head = grads[1].sum(0)
    expected = torch.stack([q[:, :2].sum((0, 1)), q[:, 2:].sum((0, 1))]) * 3**-0.5
    torch.testing.assert_close(per_head, expected)


# Known from elsewhere: one query that sees nothing turned all gradients into NaN.
def test_a_row_that_sees_nothing_does_not_poison_gradients() -> None:
    q, k = normal(3, 4, 2, 8), normal(3, 2, 1, 8, seed=1)
    state = hydragen.attention(
        q, [(k, k)], kv_lens=[[2, 0, 1]], causal=True, return_lse=True, backend="reference"
    )
    assert (state.lse == -torch.inf).sum() == 2 * (2 + 4 + 3)
    for lse in (state.lse[state.lse.isfinite()], state.lse.clamp(min=-100), state.lse.exp()):
        for grad in torch.autograd.grad(state.out.sum() + lse.sum(), [q, k], retain_graph=True):
            assert grad.isfinite().all()
            assert grad.any()


def test_unused_memory_gets_no_gradient() -> None:
    """Not even where it is NaN: what lies past a length takes no part."""
    q, k, v = normal(2, 1, 2, 4), normal(2, 5, 1, 4, seed=1).detach(), normal(2, 5, 1, 4, seed=2).detach()
    k[:, 3:], v[:, 3:] = torch.nan, torch.nan
    k, v = k.requires_grad_(), v.requires_grad_()
    out = hydragen.attention(q, [(k, v)], kv_lens=[[3, 2]], backend="reference")
    for grad in torch.autograd.grad(out.sum(), [k, v]):
        assert (grad[0, 3:] == 0).all()
        assert (grad[1, 2:] == 0).all()
        assert grad.isfinite().all()


def test_shared_keys_collect_the_gradients_of_all_rows() -> None:
    """Sharing changes no gradient: the prefix's is the sum over its copies."""
    q, prefix = normal(3, 1, 2, 4), normal(1, 5, 1, 4, seed=1)
    suffix = normal(3, 2, 1, 4, seed=2)
    shared = hydragen.attention(q, [(prefix, prefix), (suffix, suffix)], backend="reference")
    copies = prefix.detach().repeat(3, 1, 1, 1).requires_grad_()
    whole = torch.cat([copies, suffix], 1)
    apart = hydragen.attention(q, [(whole, whole)], backend="reference")
    weights = normal(*shared.shape, seed=3).detach()
    (of_prefix,) = torch.autograd.grad((shared * weights).sum(), prefix)
    (of_copies,) = torch.autograd.grad((apart * weights).sum(), copies)
    torch.testing.assert_close(of_prefix[0], of_copies.sum(0))


@pytest.mark.triton
def test_triton_refuses_gradients(device: torch.device) -> None:
    tensors = {
        "q": torch.zeros(2, 1, 2, 16, device=device),
        "k": torch.zeros(1, 3, 2, 16, device=device),
        "v": torch.zeros(1, 3, 2, 16, device=device),
        "sinks": torch.zeros(2, device=device),
    }

    def attend() -> Any:
        kv = [(tensors["k"], tensors["v"])]
        return hydragen.attention(tensors["q"], kv, sinks=tensors["sinks"], backend="triton")

    for name in tensors:
        tensors[name].requires_grad_(True)
        with pytest.raises(
            ValueError, match=r'"triton" computes no gradients.*requires_grad=True; .*"reference"'
        ):
            attend()
        with torch.no_grad():
            assert attend().shape == (2, 1, 2, 16)
        with torch.inference_mode():
            assert attend().shape == (2, 1, 2, 16)
        tensors[name].requires_grad_(False)
    assert not attend().requires_grad


def test_inference_mode_leaves_nothing_that_stops_a_backward_pass() -> None:
    q, (k, v) = torch.randn(1, 3, 2, 8), torch.randn(2, 1, 9, 2, 8)
    with torch.inference_mode():
        hydragen.attention(q, [(k, v)], window=3)
    hydragen.attention(q.requires_grad_(), [(k, v)], window=3).sum().backward()
    assert q.grad is not None


def test_nothing_to_attend_has_gradients_of_zero() -> None:
    q = torch.randn(2, 1, 2, 8, requires_grad=True)
    v = torch.randn(2, 0, 2, 8, requires_grad=True)
    hydragen.attention(q, [(v.detach(), v)]).sum().backward()
    assert q.grad is not None
    assert not q.grad.any()
    assert v.grad is not None


def test_autocast_around_the_backward_pass_changes_nothing() -> None:
    q, (k, v) = torch.randn(2, 5, 4, 16), torch.randn(2, 2, 30, 2, 16)
    grads = []
    for enabled in (False, True):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            hydragen.attention(inputs[0], [(inputs[1], inputs[2])]).sum().backward()
        grads.append([x.grad for x in inputs])
    for plain, autocast in zip(*grads, strict=True):
        assert torch.equal(plain, autocast)

"""torch.func and forward-mode derivatives: the reference goes along, the Triton path says that it cannot."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import hydragen
from hydragen.transforms import check_untransformed, in_transform
from hydragen_reference.segment import KEYS_PER_CHUNK

BATCH, PREFIX, SUFFIX = 4, 20, 5
TREE = hydragen.PrefixTree.from_levels([[PREFIX], [SUFFIX] * BATCH])
NAMES = ("q", "pk", "pv", "sk", "sv", "sinks")
SHAPES = ((BATCH, 2, 4, 16), *((1, PREFIX, 2, 16),) * 2, *((BATCH, SUFFIX, 2, 16),) * 2, (4,))


def draw(dtype: torch.dtype = torch.float64, device: Any = "cpu", seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=generator, dtype=dtype).to(device) for s in SHAPES)


def attend(backend: str) -> Callable[..., Tensor]:
    """`attention` of all six tensors."""

    def call(q: Tensor, pk: Tensor, pv: Tensor, sk: Tensor, sv: Tensor, sinks: Tensor) -> Tensor:
        kv = [(pk, pv), (sk, sv)]
        return hydragen.attention(q, kv, sinks=sinks, causal=True, backend=backend)

    return call


def run_of(backend: str, like: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """The same by a plan whose run has been seen before."""
    _, pk, pv, sk, sv, _ = like
    plan = hydragen.plan(TREE, [(pk, pv), (sk, sv)], num_q_heads=4, q_len=2, backend=backend)

    def call(q: Tensor, pk: Tensor, pv: Tensor, sk: Tensor, sv: Tensor, sinks: Tensor) -> Tensor:
        return plan.run(q, [(pk, pv), (sk, sv)], sinks=sinks, causal=True)

    call(*like)
    return call


def calls(backend: str, like: tuple[Tensor, ...]) -> list[Callable[..., Tensor]]:
    return [attend(backend), run_of(backend, like)]


def with_one(tensors: tuple[Tensor, ...], index: int, value: Tensor) -> tuple[Tensor, ...]:
    return *tensors[:index], value, *tensors[index + 1 :]


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_tangents_are_finite_differences(index: int) -> None:
    tensors, tangent = draw(), draw(seed=1)[index]
    for call in calls("reference", tensors):

        def of_one(x: Tensor, call: Callable[..., Tensor] = call) -> Tensor:
            return call(*with_one(tensors, index, x))

        step = 1e-5 * tangent
        expected = (of_one(tensors[index] + step) - of_one(tensors[index] - step)) / 2e-5
        assert expected.abs().max() > 1e-3
        out, found = torch.func.jvp(of_one, (tensors[index],), (tangent,))
        torch.testing.assert_close(out, of_one(tensors[index]))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(tensors[index], tangent)
            found = forward_ad.unpack_dual(of_one(dual)).tangent
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_all_ways_to_a_derivative_agree() -> None:
    tensors = draw()
    call = attend("reference")

    def loss(*given: Tensor) -> Tensor:
        return call(*given).square().sum()

    every = tuple(range(len(tensors)))
    of_func = torch.func.grad(loss, every)(*tensors)
    leaves = [x.clone().requires_grad_() for x in tensors]
    of_autograd = torch.autograd.grad(loss(*leaves), leaves)
    for x, y in zip(of_func, of_autograd, strict=True):
        torch.testing.assert_close(x, y)

    def of_sinks(x: Tensor) -> Tensor:
        return loss(*tensors[:5], x)

    sinks = tensors[5]
    forward, reverse = torch.func.jacfwd(of_sinks)(sinks), torch.func.jacrev(of_sinks)(sinks)
    torch.testing.assert_close(forward, of_autograd[5])
    torch.testing.assert_close(reverse, of_autograd[5])
    hessian = torch.func.hessian(of_sinks)(sinks)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(of_sinks, sinks))


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_mapped_is_one_after_another(index: int) -> None:
    tensors = draw()
    several = torch.stack([draw(seed=seed)[index] for seed in range(3)])
    for call in calls("reference", tensors):
        in_dims = tuple(0 if i == index else None for i in range(len(NAMES)))
        found = torch.vmap(call, in_dims)(*with_one(tensors, index, several))
        expected = torch.stack([call(*with_one(tensors, index, x)) for x in several])
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_a_gathered_tree_of_long_segments_is_mapped(which: str) -> None:
    """Blocks that take some of the tokens, and keys in several chunks."""
    long = KEYS_PER_CHUNK + 3
    tree = hydragen.PrefixTree.from_parents([-1, 0, 0, 1, -1], row_to_node=[3, 2, 1, 4])
    offsets = np.cumsum([0, 4, long, 2, 5, 3]).tolist()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(3, *shape, generator=generator, dtype=torch.float64)
        for shape in ((4, 1, 2, 3), (offsets[-1], 1, 3), (offsets[-1], 1, 3))
    )

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv = hydragen.PackedKV(k, v, offsets)
        return hydragen.attention(q, kv, tree=tree, window=long, backend="reference")

    given = {"q": q, "k": k, "v": v}
    fixed = {name: x if name == which else x[0] for name, x in given.items()}
    found = torch.vmap(call, tuple(0 if name == which else None for name in given))(*fixed.values())
    rows = [call(*(x[i] if name == which else x[0] for name, x in given.items())) for i in range(3)]
    torch.testing.assert_close(found, torch.stack(rows))


def test_a_call_within_a_transform_leaves_nothing_behind() -> None:
    """What a plan keeps for the next call was not made by the transform, which would have wrapped it."""
    tensors = tuple(torch.randn(s, dtype=torch.float64) for s in SHAPES)
    _, pk, pv, sk, sv, _ = tensors
    plan = hydragen.plan(TREE, [(pk, pv), (sk, sv)], num_q_heads=4, q_len=2, backend="reference")

    def run(q: Tensor) -> Tensor:
        return plan.run(q, [(pk, pv), (sk, sv)], causal=True)

    torch.func.jvp(run, (tensors[0],), (tensors[0],))
    before = len(hydragen.api._PLANS)
    torch.func.jvp(lambda q: attend("reference")(q, *tensors[1:]), (tensors[0],), (tensors[0],))
    assert len(hydragen.api._PLANS) == before
    tokens = plan._state.tokens(plan._planned, plan._work, True)
    for x in tokens:
        assert x is None or not torch._C._functorch.is_functorch_wrapped_tensor(x)
    assert tokens.q_pos is not None


@pytest.mark.triton
@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_triton_refuses_tangents_and_mapping(index: int, device: torch.device) -> None:
    tensors, tangent = draw(torch.float32, device), draw(torch.float32, device, seed=1)[index]
    one = tensors[index]
    name = {"q": "q", "sinks": "sinks", "pk": r"k of kv\[0\]", "pv": r"v of kv\[0\]"}.get(
        NAMES[index], rf"{NAMES[index][-1]} of kv\[1\]"
    )
    for call in calls("triton", tensors):
        expected = call(*tensors)

        def of_one(x: Tensor, call: Callable[..., Tensor] = call) -> Tensor:
            return call(*with_one(tensors, index, x))

        lost = (
            rf'"triton" computes no forward-mode derivatives, but {name} has a tangent.*lost; .*"reference"'
        )
        with pytest.raises(ValueError, match=lost):
            torch.func.jvp(of_one, (one,), (tangent,))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(one, tangent)
            with pytest.raises(ValueError, match=lost):
                of_one(dual)
            assert torch.equal(of_one(one), expected)  # others may be in use around it
        mapped = (
            rf'"triton" cannot be mapped by torch.vmap, but {name} is batched.*"reference".*part of the batch'
        )
        with pytest.raises(ValueError, match=mapped):
            torch.vmap(of_one)(torch.stack([one, one]))
        with pytest.raises(ValueError, match="computes no gradients"):
            torch.func.grad(lambda x, of_one=of_one: of_one(x).sum())(one)
        with pytest.raises(ValueError, match=r"cannot run within torch\.func"):
            torch.func.functionalize(of_one)(one)
        assert torch.equal(call(*tensors), expected)


@pytest.mark.triton
def test_triton_runs_beside_a_map_that_does_not_concern_it(device: torch.device) -> None:
    tensors = draw(torch.float32, device)
    for call in calls("triton", tensors):
        found = torch.vmap(lambda x, call=call: x * call(*tensors).sum())(torch.ones(3, device=device))
        assert torch.equal(found, call(*tensors).sum().expand(3))


@pytest.mark.triton
def test_triton_after_a_refusal_finds_its_tables(device: torch.device) -> None:
    """A refused first call must not leave a plan whose positions the transform has wrapped."""
    tensors = draw(torch.float32, device)
    q, pk, pv, sk, sv, _ = tensors
    plan = hydragen.plan(TREE, [(pk, pv), (sk, sv)], num_q_heads=4, q_len=2, backend="triton")

    def run(q: Tensor) -> Tensor:
        return plan.run(q, [(pk, pv), (sk, sv)], causal=True, window=7)

    with pytest.raises(ValueError, match="has a tangent"):
        torch.func.jvp(run, (q,), (q,))
    expected = hydragen.attention(q, [(pk, pv), (sk, sv)], causal=True, window=7, backend="reference")
    torch.testing.assert_close(run(q), expected, rtol=1e-4, atol=1e-5)


def test_plans_are_made_and_updated_outside() -> None:
    q, pk, pv, sk, sv, _ = draw()
    lens = torch.full((BATCH,), 3)
    kv = [(pk, pv), (sk, sv)]
    plan = hydragen.plan(TREE, kv, num_q_heads=4, q_len=2, kv_lens=[None, lens])

    def make(q: Tensor) -> Tensor:
        return hydragen.plan(TREE, kv, num_q_heads=4, q_len=2).run(q, kv)

    def update(q: Tensor) -> Tensor:
        plan.update([None, lens])
        return plan.run(q, kv)

    for transform in (torch.vmap, torch.func.functionalize):
        with pytest.raises(
            ValueError, match=r"hydragen\.plan must be called outside of torch\.func.*plan before"
        ):
            transform(make)(q[None])
        with pytest.raises(
            ValueError, match=r"Plan\.update must be called outside of torch\.func.*update before"
        ):
            transform(update)(q[None])


def test_merge_states_goes_along() -> None:
    out, lse = torch.randn(2, 3, 2, 4, dtype=torch.float64), torch.randn(2, 3, 2, dtype=torch.float64)

    def merge(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(hydragen.merge_states([(out[0], lse[0]), (out[1], lse[1])]))

    leaves = out.clone().requires_grad_(), lse.clone().requires_grad_()
    assert torch.autograd.gradcheck(merge, leaves, check_forward_ad=True, check_batched_forward_grad=True)
    mapped = torch.vmap(merge)(torch.stack([out, -out]), torch.stack([lse, -lse]))
    for found, *expected in zip(mapped, merge(out, lse), merge(-out, -lse), strict=True):
        torch.testing.assert_close(found, torch.stack(expected))


def test_tensors_are_told_from_one_another() -> None:
    x = torch.ones(2)
    assert not in_transform()
    check_untransformed("nothing", "", [("x", x), ("y", None)])
    with forward_ad.dual_level():
        assert in_transform()
        check_untransformed("nothing", "", [("x", x)])
        with pytest.raises(
            ValueError, match=r"^this computes no forward-mode derivatives, but y has .*; do that$"
        ):
            check_untransformed("this", "do that", [("x", x), ("y", forward_ad.make_dual(x, x))])
    assert not in_transform()

"""The second run of a kind skips the checks: only where nothing that they look at has changed."""

import pytest
import torch
from steps import HEADS, TREE, layer, normal, queries, state
from torch import Tensor

import hydragen
from hydragen import PrefixTree
from hydragen.plan_state import lasting


def test_runs_are_not_recognised_by_looks_alone(backend: str, device: torch.device) -> None:
    """The second run of a kind skips the checks: not for tensors that only look like those of the first."""
    kv, q = layer(0, device), queries(device=device)
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, backend=backend)
    for _ in range(2):
        expected = plan.run(q, kv)
    negated = torch._neg_view(q)
    torch.testing.assert_close(plan.run(negated, kv), plan.run(-q, kv))
    assert isinstance(expected, Tensor)
    assert not torch.equal(state(plan.run(negated, kv, return_lse=True)).out, expected)
    with pytest.raises(TypeError, match="q must be a dense tensor"):
        plan.run(q.to_sparse(), kv)


def test_equal_options_of_other_types_are_not_recognised(backend: str, device: torch.device) -> None:
    """1, 1.0 and True are equal, and one of them is refused."""
    kv, q = layer(0, device), queries(device=device)
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, backend=backend)
    for _ in range(2):
        torch.testing.assert_close(plan.run(q, kv, scale=1), plan.run(q, kv, scale=1.0))
        with pytest.raises(TypeError, match="scale must be a finite number"):
            plan.run(q, kv, scale=True)
        plan.run(q, kv, causal=False)
        with pytest.raises(TypeError, match="causal must be True or False"):
            plan.run(q, kv, causal=0)  # type: ignore[arg-type]  # the wrong type is the point


def test_sinks_of_a_recognised_run(backend: str, device: torch.device) -> None:
    kv, q = layer(0, device), queries(device=device)
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, backend=backend)
    sinks = torch.linspace(-1, 1, HEADS, device=device)
    strided = sinks.repeat_interleave(2)[::2]
    for _ in range(2):
        expected = plan.run(q, kv, sinks=sinks)
        torch.testing.assert_close(plan.run(q, kv, sinks=strided), expected)
    assert not torch.equal(state(plan.run(q, kv, return_lse=True)).out, expected)
    constant = torch.ones(1, device=device).expand(HEADS)  # with strides of 0, as a sparse tensor
    for _ in range(2):
        plan.run(q, kv, sinks=constant)
    with pytest.raises(TypeError, match="sinks must be a dense tensor"):
        plan.run(q, kv, sinks=sinks.to_sparse())


def test_a_recognised_run_has_the_dtype_that_is_asked_for(backend: str, device: torch.device) -> None:
    kv, q = layer(0, device), queries(device=device)
    half = [(k.half(), v.half()) for k, v in kv]
    plan = hydragen.plan(TREE, half, num_q_heads=HEADS, backend=backend)
    for _ in range(2):
        exact, rounded = (plan.run(q.half(), half, out_dtype=x) for x in (torch.float32, None))
        assert isinstance(exact, Tensor)
        assert isinstance(rounded, Tensor)
        assert (exact.dtype, rounded.dtype) == (torch.float32, torch.float16)
        torch.testing.assert_close(exact.half(), rounded)
        assert not torch.equal(exact, rounded.float())


def test_gradients_asked_for_after_runs_without(backend: str, device: torch.device) -> None:
    kv, q = layer(0, device), queries(device=device).requires_grad_()
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            plan.run(q, kv)
    if backend == "reference":
        out = plan.run(q, kv)
        assert isinstance(out, Tensor)
        assert out.requires_grad
    else:
        with pytest.raises(ValueError, match="no gradients"):
            plan.run(q, kv)


@pytest.mark.gpu
@pytest.mark.triton
def test_kinds_of_runs_do_not_pile_up(device: torch.device) -> None:
    kv, q = layer(0, device), queries(device=device)
    plan = hydragen.plan(TREE, kv, num_q_heads=HEADS)
    for step in range(600):
        plan.run(q, kv, scale=1 + step / 1000)
    assert len(plan._runner._ready) <= 256


def test_layers_of_the_tree_before_are_not_recognised(backend: str, device: torch.device) -> None:
    """A row that ended at the second slot may end at the third now, which the old layer does not have."""
    before, after = (
        PrefixTree.from_parents([-1, 0, 0]),
        PrefixTree.from_parents([-1, 0, 0, 0], row_to_node=[3, 2]),
    )
    old, new = (
        [(normal(1, 5, 2, 16, device=device),) * 2, (normal(rows, 4, 2, 16, device=device),) * 2]
        for rows in (2, 3)
    )
    lens = [torch.tensor([5], device=device), torch.tensor([4, 4], device=device)]
    plan = hydragen.plan(before, old, num_q_heads=4, kv_lens=lens, reserve=2.0, backend=backend)
    q = normal(2, 1, 4, 16, device=device)
    for _ in range(2):
        plan.run(q, old)
    plan.update([lens[0], torch.tensor([4, 4, 4], device=device)], tree=after, kv=new)
    with pytest.raises(ValueError, match="must have the shape that the plan was made for"):
        plan.run(q, old)
    torch.testing.assert_close(plan.run(q, new), hydragen.attention(q, new, tree=after, backend=backend))


def test_the_newest_launches_last() -> None:
    """When the tree changes a plan keeps its tables and the launches that it made last."""
    uploads: dict[object, object] = {"tables": 0, **{(i, "strides"): i for i in range(70)}}
    assert sorted(lasting(uploads).values()) == [0, *range(6, 70)]

"""Wrong plans, runs and updates, each refused by name."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hydragen
from hydragen import PackedKV, PagedKV, PrefixTree


def names(cases: list[tuple[Any, ...]]) -> list[str]:
    return [case[0] for case in cases]


KV: Any = [(torch.zeros(1, 3, 2, 8),) * 2, (torch.zeros(2, 4, 2, 8),) * 2]
SMALL = PrefixTree.from_levels([[3], [4, 4]])
RIGHT: dict[str, Any] = {"tree": SMALL, "kv": KV, "num_q_heads": 4}
WRONG_PLANS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("no tree", {"tree": None}, TypeError, "tree must be a hydragen.PrefixTree, got None"),
    ("kv", {"kv": 3}, TypeError, "kv must be a list of levels"),
    ("heads", {"num_q_heads": 3}, ValueError, "num_q_heads"),
    ("no heads", {"num_q_heads": 0}, ValueError, "num_q_heads must be an integer of at least 1, got 0"),
    ("q_len", {"q_len": 0}, ValueError, "q_len must be an integer of at least 1, got 0"),
    ("both", {"q_len": 1, "cu_seqlens_q": [0, 1, 2]}, ValueError, "q_len must be left out"),
    ("rows", {"cu_seqlens_q": [0, 1]}, ValueError, "cu_seqlens_q must have one offset per row"),
    ("total", {"total_q": 3}, ValueError, "total_q must come with cu_seqlens_q"),
    ("total type", {"cu_seqlens_q": [0, 1, 2], "total_q": 2.0}, TypeError, "total_q must be an integer"),
    (
        "total",
        {"cu_seqlens_q": [0, 1, 2], "total_q": 3},
        ValueError,
        "total_q must be the last of cu_seqlens_q, 2",
    ),
    ("max", {"cu_seqlens_q": [0, 3, 4], "max_seqlen_q": 2}, ValueError, "max_seqlen_q must be at least"),
    ("reserve", {"reserve": 0.5}, ValueError, "reserve must be a number from 1 to 1e6, got 0.5"),
    ("reserve nan", {"reserve": float("nan")}, ValueError, "reserve must be a number from 1 to 1e6, got nan"),
    ("reserve huge", {"reserve": 1e30}, ValueError, "reserve must be a number from 1 to 1e6, got 1e+30"),
    ("reserve type", {"reserve": "2"}, TypeError, "reserve must be a number from 1 to 1e6"),
    ("backend", {"backend": "cuda"}, ValueError, "backend must be one of"),
    ("lens", {"kv_lens": [None, [4, 5]]}, ValueError, "kv_lens[1] must not exceed"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), [w[1:] for w in WRONG_PLANS], ids=[w[0] for w in WRONG_PLANS]
)
def test_wrong_plans_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        hydragen.plan(**{**RIGHT, **changes})


Q = torch.zeros(2, 1, 4, 8)
WRONG_RUNS: list[tuple[str, tuple[Any, Any], type[Exception], str]] = [
    ("q shape", (Q[:1], KV), ValueError, "q must have the shape that the plan was made for, [2, 1, 4, 8]"),
    ("q dtype", (Q.half(), KV), TypeError, "q must have the dtype that the plan was made for"),
    ("q", (None, KV), TypeError, "q must be a torch.Tensor, got None"),
    ("levels", (Q, KV[:1]), ValueError, "kv must have the levels that the plan was made for, 2, got 1"),
    ("kv", (Q, 7), TypeError, "kv must be as the plan was made for"),
    ("pair", (Q, [KV[0], 7]), TypeError, "kv[1] must be a pair (k, v), got int"),
    ("shape", (Q, [KV[0], KV[0]]), ValueError, "kv[1] k must have the shape that the plan was made for"),
    ("dtype", (Q, [KV[0], (KV[1][0].half(),) * 2]), TypeError, "kv[1] k must have the dtype of q"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error", "message"), [w[1:] for w in WRONG_RUNS], ids=[w[0] for w in WRONG_RUNS]
)
def test_wrong_runs_are_refused(arguments: tuple[Any, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        hydragen.plan(**RIGHT).run(*arguments)


def test_options_belong_to_the_run() -> None:
    plan = hydragen.plan(**RIGHT)
    for options, message in (
        ({"window": 0}, "window"),
        ({"scale": float("nan")}, "scale"),
        ({"out_dtype": 3}, "out_dtype"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            plan.run(Q, KV, **options)


def test_wrong_updates_are_refused() -> None:
    fixed = hydragen.plan(**RIGHT)
    roomy = hydragen.plan(**RIGHT, reserve=2.0)
    other = PrefixTree.from_levels([[3], [4, 4, 4]])
    for plan, update, message in (
        (fixed, {"kv_lens": [None, [1, 2]]}, "plan that was made for fixed lengths"),
        (fixed, {"tree": SMALL}, "plan without reserve"),
        (fixed, {"validate": "yes"}, "validate must be True or False"),
        (fixed, {"page_indices": [1]}, "plan without pages"),
        (fixed, {"cu_seqlens_q": torch.zeros(3)}, "plan that was made without offsets"),
        (roomy, {"tree": other}, "kv must be given with a tree of another size"),
        (roomy, {"tree": 5}, "tree must be a hydragen.PrefixTree or None, got int"),
        (roomy, {"kv_lens": [None, [1, 9]]}, "must not exceed"),
        (roomy, {"kv": [(x[..., :4], x[..., :4]) for x, _ in KV]}, "kv"),
    ):
        with pytest.raises((ValueError, TypeError), match=re.escape(message)):
            plan.update(**update)


def test_a_length_fixed_at_first_cannot_grow_by_a_tensor() -> None:
    tree = PrefixTree.from_parents([-1, 0, 0])
    kv = [(torch.zeros(1, 10, 2, 8),) * 2, (torch.zeros(2, 10, 2, 8),) * 2]
    plan = hydragen.plan(tree, kv, num_q_heads=4, kv_lens=[[5], torch.tensor([3, 4])])
    with pytest.raises(ValueError, match="kv_lens must not exceed the lengths that the plan was made for"):
        plan.update([torch.tensor([8]), torch.tensor([3, 4])])


def test_trees_and_layouts_that_do_not_fit_the_plan() -> None:
    levels = [(torch.zeros(1, 4, 2, 8),) * 2, (torch.zeros(2, 4, 2, 8),) * 2]
    tree = PrefixTree.from_parents([-1, 0, 0])
    plan = hydragen.plan(tree, levels, num_q_heads=4, reserve=3.0)
    with pytest.raises(ValueError, match="kv must be given with a tree whose nodes have other depths"):
        plan.update(tree=PrefixTree.from_parents([-1, -1, 0], row_to_node=[1, 2]))
    pool, table = torch.zeros(3, 4, 2, 8), [0, 1, 2, 3]
    paged = hydragen.plan(tree, PagedKV(pool, pool, table, [0, 1, 2]), num_q_heads=4, reserve=3.0)
    with pytest.raises(ValueError, match="kv must have the layout that the plan was made for"):
        paged.update(kv=PackedKV(pool[0], pool[0], [0, 1, 2, 4]))
    growing = hydragen.plan(
        tree,
        PagedKV(pool, pool, table, [0, 1, 2]),
        num_q_heads=4,
        reserve=3.0,
        kv_lens=torch.tensor([1, 2, 3]),
    )
    with pytest.raises(ValueError, match="kv_lens must be given with kv"):
        growing.update(kv=PagedKV(pool, pool, table, [2, 1, 0]))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_plans_are_not_copied(duplicate: Callable[[object], object]) -> None:
    """A copy would share memory that the original updates, or know nothing of graphs."""
    plan = hydragen.plan(**RIGHT)
    with pytest.raises(TypeError, match=r"a Plan cannot be copied or pickled.*make another with hydragen"):
        duplicate(plan)
    assert torch.equal(plan.run(Q, KV), hydragen.attention(Q, KV))


def test_other_pages_alone_are_checked_for_fresh_tokens() -> None:
    """Tokens of the last update may not be written yet: two of them must not share a place."""
    pool = torch.zeros(6, 2, 2, 8)
    tree, lens = PrefixTree.from_parents([-1, 0, 0]), torch.tensor([2, 1, 1])
    plan = hydragen.plan(tree, PagedKV(pool, pool, [0, 1, 2, 3], [0, 1, 2]), num_q_heads=4, kv_lens=lens)
    plan.update(lens + torch.tensor([0, 1, 1]))
    with pytest.raises(
        ValueError, match="page_indices must give every new token a place of its own, got page 1"
    ):
        plan.update(page_indices=[0, 1, 1], validate=True)
    plan.update(page_indices=[0, 1, 3], validate=True)
    plan.update(lens + torch.tensor([0, 1, 1]))  # nothing is new any more
    plan.update(page_indices=[0, 1, 1], validate=True)

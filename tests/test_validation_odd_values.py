"""Values that pass for others: tensors without data, bools as integers, masked arrays, endless counts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from right_arguments import keys, packed, packed_kv, two_levels, zeros
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parameter import UninitializedParameter

import hydragen
from hydragen import PackedKV, PagedKV, PrefixTree
from hydragen.validation.queries import MOST_QUERIES, check_device_offsets

TREE = PrefixTree.from_levels([[5], [3] * 4])
META = torch.tensor(1, device="meta")
HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8}
MODE = FakeTensorMode()


def plan(**changes: Any) -> hydragen.Plan:
    return hydragen.plan(TREE, two_levels()["kv"], **{"num_q_heads": 4, **changes})


def explain(**changes: Any) -> object:
    return hydragen.explain(TREE, **{**HEADS, **changes})


def fake(x: torch.Tensor) -> torch.Tensor:
    return MODE.from_tensor(x)


def fakes(kv: list[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(fake(k), fake(v)) for k, v in kv]


def pool(page_indptr: object, page_indices: object) -> PagedKV:
    return PagedKV(zeros(9, 2, 2, 8), zeros(9, 2, 2, 8), page_indptr, page_indices)


def paged(**changes: Any) -> dict[str, Any]:
    return packed(kv=pool([0, 3, 5, 6, 7, 9], [4, 2, 0, 8, 7, 6, 5, 3, 1]), **changes)


@pytest.mark.parametrize(
    "number", [META, fake(torch.tensor(1)), torch.tensor(True), np.ma.array(1, mask=True)]
)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("num_q_heads", lambda x: plan(num_q_heads=x)),
        ("q_len", lambda x: plan(q_len=x)),
        ("q_len", lambda x: explain(q_len=x)),
        ("min_shared", lambda x: PrefixTree.from_token_ids([[1]], min_shared=x)),
        ("row", TREE.path),
        ("node", PrefixTree.from_token_ids([[1], [2]]).node_tokens),
        ("max_lines", TREE.describe),
    ],
)
def test_what_is_no_number_is_no_integer(name: str, call: Callable[[object], object], number: object) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be .*; give a single integer$"):
        call(number)


BOOLS = [True, np.bool_(False), torch.tensor(True), np.array(False)]


@pytest.mark.parametrize("odd", BOOLS, ids=["bool", "numpy", "tensor", "array"])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("kv_lens[1]", lambda x: hydragen.attention(**two_levels(kv_lens=[None, [x, 2, 3, 0]]))),
        ("kv_lens", lambda x: hydragen.attention(**packed(kv_lens=(5, x, 2, 3, 0)))),
        ("cu_seqlens_q", lambda x: hydragen.attention(**packed(cu_seqlens_q=[0, x, 3, 3, 7]))),
        (
            "kv.cu_seqlens_k",
            lambda x: hydragen.attention(**packed(kv=packed_kv(cu_seqlens_k=[x, 5, 8, 11, 14, 17]))),
        ),
        ("kv.page_indptr", lambda x: hydragen.attention(**packed(kv=pool([x, 1, 1, 1, 1, 1], [2])))),
        ("kv.page_indices", lambda x: hydragen.attention(**packed(kv=pool([0, 2, 2, 2, 2, 2], [x, 2])))),
        ("parents", lambda x: PrefixTree.from_parents([-1, x])),
        ("parents", lambda x: PrefixTree([-1, x], [1, 2], [1])),  # type: ignore[arg-type]
        ("parents[1]", lambda x: PrefixTree.from_levels([[1, 1], [2, 2]], parents=[None, [x, 0]])),
        ("sequences[0]", lambda x: PrefixTree.from_token_ids([[x, 2]])),
        ("counts", lambda x: TREE.fork([2, x, 0, 1])),
    ],
)
def test_a_bool_among_integers_is_no_integer(
    name: str, call: Callable[[object], object], odd: object
) -> None:
    with pytest.raises(TypeError) as caught:
        call(odd)
    assert str(caught.value).startswith(f"{name} must hold integers, got a bool at index ")
    assert "; convert it with int()" in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [[0, 1, 1, 0], [np.int64(1), torch.tensor(0), np.array(1), 1], range(4), np.ma.array([1, 0, 1, 2])],
)
def test_zeros_and_ones_of_every_kind_are_integers(value: object) -> None:
    assert hydragen.attention(**two_levels(kv_lens=[None, value])).shape == (4, 2, 4, 8)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("kv_lens[1]", lambda x: hydragen.attention(**two_levels(kv_lens=[None, x]))),
        ("kv_lens", lambda x: PrefixTree.from_parents([-1, 0, 0, 0], x)),
        ("sequences[0]", lambda x: PrefixTree.from_token_ids([x])),
        ("counts", TREE.fork),
    ],
)
def test_masked_entries_are_no_integers(name: str, call: Callable[[object], object]) -> None:
    with pytest.raises(ValueError, match=" must ") as caught:
        call(np.ma.array([3, 2, 3, 0], mask=[1, 0, 0, 1]))
    assert str(caught.value).startswith(f"{name} must hold an integer in every entry, got ")
    assert "2 masked ones" in str(caught.value)
    assert ".filled(" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("q_len", lambda: plan(q_len=2**31 - 1)),
        ("q_len", lambda: explain(q_len=2**31 - 1)),
        ("q_len", lambda: explain(q_len=np.int32(2**31 - 1))),
        ("cu_seqlens_q", lambda: plan(cu_seqlens_q=[0, 1, 2, 3, 2**40])),
        ("max_seqlen_q", lambda: check_device_offsets(zeros(5).int(), torch.device("cpu"), 2**62)),
    ],
)
def test_query_tokens_are_limited(name: str, call: Callable[[], object]) -> None:
    with pytest.raises(
        ValueError, match=rf"^{name} must .* at most {MOST_QUERIES} query tokens .*, got .*; .+$"
    ):
        call()


@pytest.mark.parametrize("call", [plan, explain])
def test_heads_of_all_tokens_are_limited(call: Callable[..., object]) -> None:
    with pytest.raises(
        ValueError, match=r"^num_q_heads must make at most \d+ .*, got 1073741824 heads of 4 "
    ):
        call(num_q_heads=2**30)


def test_a_reserve_beyond_every_float() -> None:
    with pytest.raises(ValueError, match=r"^reserve must be a number from 1 to 1e6, got "):
        plan(reserve=10**400)


@pytest.mark.parametrize("counts", [[2**31] * 4, [2**62] * 4, 2**60])
def test_forked_rows_are_limited(counts: object) -> None:
    with pytest.raises(ValueError, match=r"^counts must give at most \d+ rows in all, got .*; .+$"):
        TREE.fork(counts)


MIXED: list[tuple[str, Callable[[], object]]] = [
    ("kv[0] k", lambda: hydragen.attention(**two_levels(kv=[(fake(keys(1)), keys(1)), (keys(), keys())]))),
    ("kv[1] v", lambda: hydragen.attention(**two_levels(kv=[(keys(1), keys(1)), (keys(), fake(keys()))]))),
    ("kv.k", lambda: hydragen.attention(**packed(kv=packed_kv(k=fake(zeros(17, 2, 8)))))),
    ("sinks", lambda: hydragen.attention(**two_levels(sinks=fake(zeros(4))))),
    ("kv[0] k", lambda: plan(q_len=2).run(zeros(4, 2, 4, 8), fakes(two_levels()["kv"]))),
    ("sinks", lambda: plan(q_len=2).run(zeros(4, 2, 4, 8), two_levels()["kv"], sinks=fake(zeros(4)))),
    ("states[1].out", lambda: hydragen.merge_states([state(), state(out=fake(zeros(2, 4, 8)))])),
    ("states[1].lse", lambda: hydragen.merge_states([state(), state(lse=fake(zeros(2, 4)))])),
    (
        "states[0].out",
        lambda: hydragen.merge_states([state(fake(zeros(2, 4, 8)), fake(zeros(2, 4))), state()]),
    ),
    ("states[0].out", lambda: hydragen.merge_states([state(out=fake(zeros(2, 4, 8)))])),
    ("states[0].lse", lambda: hydragen.merge_states([state(lse=fake(zeros(2, 4)))])),
]
IN_GRAPH: list[tuple[str, Callable[[], object]]] = [
    ("kv[0] k", lambda: hydragen.attention(**two_levels(q=fake(two_levels()["q"])))),
    ("kv[0] k", lambda: plan(q_len=2).run(fake(zeros(4, 2, 4, 8)), two_levels()["kv"])),
    ("sinks", lambda: hydragen.attention(**all_fake(sinks=zeros(4)))),
    ("kv_lens", lambda: hydragen.attention(**all_fake(kv_lens=[None, torch.tensor([3, 2, 1, 0])]))),
    ("kv_lens", lambda: hydragen.attention(**all_fake(kv_lens=[None, [3, 2, 1, 0]]))),
]


def state(out: torch.Tensor | None = None, lse: torch.Tensor | None = None) -> hydragen.AttentionState:
    return hydragen.AttentionState(
        zeros(2, 4, 8) if out is None else out, zeros(2, 4) if lse is None else lse
    )


def all_fake(**changes: Any) -> dict[str, Any]:
    right = two_levels()
    return {"q": fake(right["q"]), "kv": fakes(right["kv"]), **changes}


@pytest.mark.parametrize(("name", "call"), MIXED)
def test_fake_tensors_among_real_ones_are_named(name: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=" must ") as caught:
        call()
    assert str(caught.value).startswith(f"{name} must hold data, got a fake tensor; ")


@pytest.mark.parametrize(("name", "call"), IN_GRAPH)
def test_real_tensors_among_fake_ones_are_named(name: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=" must ") as caught:
        call()
    assert str(caught.value).startswith(f"{name} must be of the FakeTensorMode of q, got ")


def test_fake_tensors_may_meet_real_ones_where_their_mode_lets_them() -> None:
    mode, right = FakeTensorMode(allow_non_fake_inputs=True), two_levels()
    assert isinstance(hydragen.attention(mode.from_tensor(right["q"]), right["kv"]), FakeTensor)
    level = mode.from_tensor(right["kv"][0][0]), right["kv"][0][1]
    assert hydragen.attention(right["q"], [level, right["kv"][1]]).shape == right["q"].shape


def test_fake_tensors_alone_are_right() -> None:
    assert isinstance(hydragen.attention(**all_fake()), FakeTensor)
    part = state(fake(zeros(2, 4, 8)), fake(zeros(2, 4)))
    assert isinstance(hydragen.merge_states([part, part]).out, FakeTensor)
    assert isinstance(plan(q_len=2).run(all_fake()["q"], all_fake()["kv"]), FakeTensor)
    with MODE:
        assert isinstance(hydragen.attention(**all_fake(kv_lens=[None, [3, 2, 1, 0]])), FakeTensor)


def test_parameters_are_tensors_for_a_compiler_too() -> None:
    torch.compiler.reset()
    merge = torch.compile(lambda *states: hydragen.merge_states(states), fullgraph=True, backend="eager")
    learnt = state(torch.nn.Parameter(zeros(2, 4, 8)), torch.nn.Parameter(zeros(2, 4)))
    assert merge(state(), learnt).out.shape == merge(learnt, state()).out.shape == (2, 4, 8)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("q", lambda x: hydragen.attention(**two_levels(q=x))),
        ("kv[0] k", lambda x: hydragen.attention(**two_levels(kv=[(x, keys(1)), (keys(), keys())]))),
        ("kv.v", lambda x: hydragen.attention(**packed(kv=PackedKV(zeros(17, 2, 8), x, [0, 17])))),
        ("sinks", lambda x: hydragen.attention(**two_levels(sinks=x))),
        ("states[0].out", lambda x: hydragen.merge_states([(x, x)])),
        ("kv's first k", lambda x: hydragen.plan(TREE, [(x, keys(1)), (keys(), keys())], num_q_heads=4)),
    ],
)
def test_an_uninitialized_parameter_is_named(name: str, call: Callable[[object], object]) -> None:
    with pytest.raises(ValueError, match=" must ") as caught:
        call(UninitializedParameter())
    assert str(caught.value).startswith(f"{name} must hold data, got an uninitialized parameter; ")


def test_uninitialized_lengths_are_named() -> None:
    with pytest.raises(TypeError, match=r"^kv_lens\[1\] must be a list, array or CPU tensor of integers"):
        hydragen.attention(**two_levels(kv_lens=[None, UninitializedParameter()]))


@pytest.mark.parametrize("device", [10**30, -(10**30), 2**63, META, "cuda:99999999999999999999", 1.5])
def test_a_device_that_nothing_can_name(device: object) -> None:
    with pytest.raises(ValueError, match=r"^device must .*; leave it out for an H200$"):
        explain(device=device)


@pytest.mark.parametrize("dtype", [np.array([1, 2]), META, "float16", None, float])
def test_what_is_no_dtype(dtype: object) -> None:
    with pytest.raises(TypeError, match=r"^dtype must be one of "):
        explain(dtype=dtype)


def test_right_values_of_a_page_table() -> None:
    assert hydragen.attention(**paged()).shape == (7, 4, 8)

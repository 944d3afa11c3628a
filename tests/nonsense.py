"""Arguments that make no sense, by the thousand: right ones of which a few are replaced.

Each draw is (value, certain): whether no call with this value can be right, whatever the others are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from nonsense_options import (
    HUGE,
    META,
    Drawn,
    Odd,
    backend,
    flag,
    max_seqlen_q,
    out_dtype,
    scale,
    softcap,
    window,
)
from right_arguments import packed, packed_kv, star, two_levels
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import UninitializedParameter

from hydragen import PackedKV, PagedKV, PrefixTree

FAKES = FakeTensorMode()


def anything(rng: np.random.Generator) -> Any:
    """Something that is no tensor, no number and no tree."""
    return [
        "nonsense",
        b"bytes",
        {},
        {1: 2},
        set(),
        Odd(),
        Odd,
        torch,
        lambda: None,
        ...,
        object(),
        1j,
        range,
        slice(3),
        np.datetime64("2020"),
        iter([1, 2]),
        torch.float32,
        torch.device("cpu"),
    ][rng.integers(18)]


def a_tensor(rng: np.random.Generator, right: torch.Tensor) -> Drawn:
    """Instead of floating-point tensors among others that are real, and q."""
    if rng.integers(18) == 0:
        return FAKES.from_tensor(right), True
    return a_first_tensor(rng, right)


def a_first_tensor(rng: np.random.Generator, right: torch.Tensor) -> Drawn:
    """Instead of q: a fake one is for torch's tracing, with checks of its own."""
    other_dtypes = [
        torch.int32,
        torch.int64,
        torch.bool,
        torch.uint8,
        torch.complex64,
        torch.float8_e4m3fn,
    ]
    kind = int(rng.integers(17))
    if kind == 16:
        return UninitializedParameter(), True
    if kind == 0:
        return anything(rng), True
    if kind == 1:
        return right.to(other_dtypes[rng.integers(len(other_dtypes))]), True
    if kind == 2:
        return right.to([torch.float16, torch.bfloat16, torch.float64][rng.integers(3)]), False
    if kind == 3:
        return right.to("meta"), True
    if kind == 4:
        return right.to_sparse(), True
    if kind == 5:
        return torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)]), True
    if kind == 6:
        return [..., 3, 2.5, math.nan, True, [], [[1.0]], right.cpu().numpy(), right.tolist()][
            rng.integers(9)
        ], True
    if kind == 7:
        return right[(None,) * int(rng.integers(1, 4))], True
    if kind == 8 and right.dim() > 1 and right.shape[0]:
        return right[0], False
    if kind == 9:
        return right.flatten(), right.dim() > 1
    if kind == 10:
        return torch.zeros([]), True
    if kind == 11:
        return torch.empty(0), False
    if kind == 12:
        return right.permute(*rng.permutation(right.dim()).tolist()), False
    if kind == 13:
        return torch.full_like(right, [math.nan, math.inf, -math.inf][rng.integers(3)]), False
    # a dimension that is longer, shorter or gone
    dim = int(rng.integers(right.dim()))
    shape = list(right.shape)
    shape[dim] = int(rng.choice([0, 1, max(shape[dim] - 1, 0), shape[dim] + 1, 2 * shape[dim], 300]))
    return torch.zeros(shape, dtype=right.dtype), False


def integers(rng: np.random.Generator, right: list[int]) -> Drawn:
    """Instead of a vector of lengths or offsets."""
    at = int(rng.integers(max(len(right), 1)))

    def with_(value: Any) -> list[Any]:
        return [*right[:at], value, *right[at + 1 :]]

    kind = int(rng.integers(21))
    if kind == 0:
        return anything(rng), True
    if kind == 1:
        return with_([math.nan, math.inf, 1.5, "2", None, Odd(), 1j, META, [1]][rng.integers(9)]), False
    if kind == 2:
        return with_(-1 - int(rng.integers(5))), True
    if kind == 3:
        return with_([HUGE, 2**31, 2**32, -HUGE, 10**30, -(10**30)][rng.integers(6)]), True
    if kind == 4:
        return [float(x) for x in right], True
    if kind == 5:
        return np.array(right, np.float64) * math.nan, True
    if kind == 6:
        return torch.tensor(right, dtype=torch.float32), True
    if kind == 7:
        return torch.tensor(right, device="meta"), True
    if kind == 8:
        return [right, right], True
    if kind == 9:
        return np.array(right)[None], True
    if kind == 10:
        return np.array(right, object), True
    if kind == 11:
        return np.array(right, np.uint64) + np.uint64(2**63), True
    if kind == 12:
        return torch.tensor(right).to_sparse(), True
    if kind == 13:
        return right[:-1], False
    if kind == 14:
        return [*right, 0], False
    if kind == 15:
        return np.array(right[::-1])[::-1], False  # negative strides: right
    if kind == 17:
        return with_(
            [True, False, np.bool_(True), torch.tensor(False), np.array(True)][rng.integers(5)]
        ), True
    if kind == 18:
        return np.ma.array(with_(0), mask=np.arange(max(len(right), 1)) == at), True
    if kind == 19:
        return FAKES.from_tensor(torch.tensor(right, dtype=torch.int64)), True
    if kind == 20:
        return UninitializedParameter(), True
    return int(rng.integers(-3, 9)), True


def tree(rng: np.random.Generator) -> Drawn:
    """Instead of a tree of the right shape."""
    if rng.random() < 0.4:
        return [anything(rng), PrefixTree, [-1, 0, 0], (1, 4), 5][rng.integers(5)], True
    trees: list[Callable[[], PrefixTree]] = [
        lambda: star(1),
        lambda: star(7),
        lambda: PrefixTree.from_parents([-1]),
        lambda: PrefixTree.from_parents([-1, 0, 1, 2, 3, 4]),
        lambda: PrefixTree.from_parents([-1] * 5),
        lambda: star(4, [5, 3, 3, 3, 2**40]),
        lambda: PrefixTree.from_parents([-1, 0], row_to_node=[0, 1, 1, 0]),
    ]
    return trees[rng.integers(len(trees))](), False


def levels(rng: np.random.Generator, right: list[tuple[torch.Tensor, torch.Tensor]]) -> Drawn:
    """Instead of keys and values by level."""
    kind = int(rng.integers(8))
    if kind == 0:
        return anything(rng), True
    if kind == 1:
        return [[], None, 5, math.nan, right[0][0], [right[0][0]], [None], [()], "kv"][rng.integers(9)], True
    if kind == 2:
        return [*right, (right[0][0],)], True
    if kind == 3:
        return [*right, right[0]][:: int(rng.choice([1, -1]))], False
    at, side = int(rng.integers(len(right))), int(rng.integers(2))
    value, certain = a_tensor(rng, right[at][side])
    pair = list(right[at])
    pair[side] = value
    return [*right[:at], tuple(pair), *right[at + 1 :]], certain


def packed_keys(rng: np.random.Generator, right: PackedKV) -> Drawn:
    """Instead of packed keys and values."""
    which = int(rng.integers(4))
    if which == 0:
        return levels(rng, two_levels()["kv"])[0], False
    if which == 3:
        value, certain = integers(rng, [0, 5, 8, 11, 14, 17])
        return PackedKV(right.k, right.v, value), certain
    value, certain = a_tensor(rng, right.k)
    return (PackedKV(value, right.v, right.cu_seqlens_k), certain) if which == 1 else (
        PackedKV(right.k, value, right.cu_seqlens_k), certain
    )  # fmt: skip


def paged_keys(rng: np.random.Generator) -> Drawn:
    """Instead of a pool of 9 pages of 2 tokens, and who owns which."""
    pool, indptr, indices = torch.zeros(9, 2, 2, 8), [0, 3, 5, 6, 7, 9], [4, 2, 0, 8, 7, 6, 5, 3, 1]
    which = int(rng.integers(4))
    value, certain = integers(rng, indptr if which == 2 else indices) if which > 1 else a_tensor(rng, pool)
    fields: list[Any] = [pool, pool, indptr, indices]
    fields[which] = value
    # a page table is checked for its length and its values only if it is on the host; any page may come first
    return PagedKV(*fields), certain and which < 3


def lengths_by_level(rng: np.random.Generator) -> Drawn:
    """Instead of lengths by level."""
    kind = int(rng.integers(6))
    if kind == 0:
        return anything(rng), True
    if kind == 1:
        return [5, "ab", math.nan, [], [None], [None, None, None], True][rng.integers(7)], True
    value, certain = integers(rng, [3, 2, 1, 0])
    # a single None means all tokens
    return [None, value], certain


def call(rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, bool]]:
    """Arguments of hydragen.attention, and which were replaced, with whether that is wrong for sure."""
    form = int(rng.integers(3))
    is_packed = form > 0
    right = packed() if is_packed else two_levels()
    if form == 2:
        right["kv"] = PagedKV(
            torch.zeros(9, 2, 2, 8), torch.zeros(9, 2, 2, 8), [0, 3, 5, 6, 7, 9], [4, 2, 0, 8, 7, 6, 5, 3, 1]
        )
    draws: dict[str, Callable[[], Drawn]] = {
        "q": lambda: a_first_tensor(rng, right["q"]),
        "kv": lambda: (
            paged_keys(rng)
            if form == 2
            else packed_keys(rng, packed_kv())
            if is_packed
            else levels(rng, right["kv"])
        ),
        "tree": lambda: tree(rng),
        "kv_lens": lambda: integers(rng, [5, 3, 1, 1, 3]) if is_packed else lengths_by_level(rng),
        "cu_seqlens_q": lambda: integers(rng, [0, 1, 3, 3, 7]) if is_packed else ([0, 4], True),
        "max_seqlen_q": lambda: max_seqlen_q(rng),
        "scale": lambda: scale(rng),
        "window": lambda: window(rng),
        "softcap": lambda: softcap(rng),
        "sinks": lambda: a_tensor(rng, torch.zeros(4)),
        "out_dtype": lambda: out_dtype(rng),
        "causal": lambda: flag(rng),
        "return_lse": lambda: flag(rng),
        "batch_invariant": lambda: flag(rng),
        "validate": lambda: flag(rng),
        "backend": lambda: backend(rng),
    }
    # tensors and integers most often: they can be wrong in most ways
    names = [*draws, "q", "kv", "kv", "kv_lens", "cu_seqlens_q", "sinks"]
    chosen = {names[i] for i in rng.integers(len(names), size=rng.choice([1, 1, 1, 2, 3]))}
    replaced: dict[str, bool] = {}
    arguments = dict(right)
    for name in sorted(chosen):
        arguments[name], replaced[name] = draws[name]()
    return arguments, replaced

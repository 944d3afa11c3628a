"""What no number of drawn examples makes sure of: single sizes, memory, magnitudes; each with its bug."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from faulty_attention import attention

from hydragen.testing import Inputs, Problem, budget, laws
from hydragen.testing.conformance.capabilities import Capabilities
from hydragen.testing.conformance.corners import FAMILIES, corners, parts

ALL = [problem for family in FAMILIES for problem in corners(Capabilities(), family)]
State = tuple[torch.Tensor, torch.Tensor]
PROBLEM = Problem((-1, 0, 0, -1), (20, 3, 5, 4), (1, 2, 2), (1, 3, 2), 4, 2, head_dim_v=5, sharpness="peaked")


def changed(change: Callable[[Inputs], Inputs]) -> Callable[[Problem, Inputs], State]:
    return lambda problem, inputs: attention(problem, change(inputs))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda problem: problem.num_kv_heads == 8,
        lambda problem: problem.num_kv_heads == 32,
        lambda problem: problem.num_q_heads >= 64,
        lambda problem: problem.group_size == 16 and problem.num_kv_heads > 1,
        lambda problem: 256 in problem.kv_lens,
        lambda problem: problem.kv_lens[0] == 2048,
        lambda problem: problem.kv_lens[-1] > 4096,
        lambda problem: min(problem.q_lens) == 65,
        lambda problem: problem.num_rows == 64,
        lambda problem: problem.num_rows > 128,
        lambda problem: problem.num_nodes > 32 and problem.num_rows == 2,
        lambda problem: problem.dtype == torch.bfloat16 and max(problem.kv_lens) % 256 == 0,
        lambda problem: problem.dtype == torch.float16 and max(problem.q_lens) % 64 == 0,
        lambda problem: problem.dtype == torch.bfloat16 and max(problem.q_lens) % 16 == 0,
        lambda problem: problem.head_dim == 128 and max(problem.kv_lens) >= 256,
        lambda problem: problem.head_dim == 64 and max(problem.kv_lens) >= 256,
        lambda problem: problem.causal and max(problem.q_lens) > 128,
        lambda problem: problem.window and max(problem.q_lens) > 64,
        lambda problem: 192 in problem.q_lens,
        lambda problem: problem.causal and max(problem.kv_lens) > 2000 and max(problem.q_lens) > 1,
        lambda problem: problem.num_nodes > 8 and problem.causal and problem.parents[-1] > 7,
        lambda problem: problem.sinks and problem.num_q_heads > 64,
        lambda problem: problem.group_size == 16 and max(problem.q_lens) > 16,
        lambda problem: 176 in problem.kv_lens,
        lambda problem: problem.group_size == 12,
        lambda problem: problem.row_to_node.count(0) > 32,
        lambda problem: problem.num_rows > 256,
        lambda problem: problem.parents.count(-1) > 64,
        lambda problem: problem.num_nodes > 256,
        lambda problem: problem.path_len(0) > 8192,
        lambda problem: problem.softcap not in (None, 0.5) and problem.softcap % 1 != 0,
        lambda problem: problem.scale is not None and problem.scale % 0.25 != 0,
        lambda problem: problem.window == 128,
        lambda problem: problem.window is not None and 150 < problem.window < max(problem.kv_lens),
    ],
)
def test_each_size_alone_is_tried(wrong: Callable[[Problem], bool]) -> None:
    assert any(wrong(problem) for problem in ALL)


def test_parts_hold_all_problems_and_a_short_run_some_of_each_family() -> None:
    assert [problem for part in parts(Capabilities()).values() for problem in part] == ALL
    few = parts(Capabilities(), 7)
    assert {name.partition("-")[0] for name in few} == set(FAMILIES)
    assert {problem.dtype for part in few.values() for problem in part} == set(Capabilities().dtypes)


def test_a_right_function_passes_them_and_one_that_is_wrong_somewhere_does_not() -> None:
    for problem in ALL[::7]:
        laws.matches_oracle(attention, problem)
    problem = next(problem for problem in ALL if problem.kv_lens[0] == 256)

    def last_key_lost(problem: Problem, inputs: Inputs) -> State:
        if 256 not in problem.kv_lens:
            return attention(problem, inputs)
        k = inputs.k.clone()
        k[255] = -torch.inf * inputs.k[255].sign()
        return attention(problem, replace(inputs, k=torch.nan_to_num(k)))

    with pytest.raises(AssertionError, match="outside of the error budget"):
        laws.matches_oracle(last_key_lost, problem)


@pytest.mark.parametrize(
    "said",
    [
        {"dtypes": (torch.bfloat16,)},
        {"head_dims": (64, 128), "same_head_dim_v": True},
        {"gqa": False},
        {"group_sizes": (16,)},
        {"trees": "prefix", "same_q_len": True},
        {"trees": "none"},
        {"causal": "always", "window": "always", "sinks": "always", "scale": "always"},
        {"softcap": "always", "sharpness": ("flat",)},
        {"max_kv_heads": 8, "max_kv": 64, "max_q_len": 1, "max_rows": 3, "max_nodes": 4},
        {"sharpness": ("very_negative",), "softcap": "no", "causal": "no"},
    ],
)
def test_nothing_is_asked_that_an_implementation_cannot_do(said: dict[str, object]) -> None:
    can = Capabilities(**said)  # type: ignore[arg-type]  # one of many kinds
    found = [problem for family in FAMILIES for problem in corners(can, family)]
    assert found
    assert all(can.allows(problem) for problem in found)
    for problem in found:
        for limit, size in (
            ("max_kv_heads", problem.num_kv_heads),
            ("max_kv", max(problem.kv_lens)),
            ("max_q_len", max(problem.q_lens)),
            ("max_rows", problem.num_rows),
            ("max_nodes", problem.num_nodes),
        ):
            most = getattr(can, limit)
            assert most == getattr(Capabilities, limit) or size <= most
    laws.matches_oracle(attention, found[0])
    laws.matches_oracle(attention, found[-1])


def from_the_start(x: torch.Tensor) -> torch.Tensor:
    return x.as_strided(x.shape, x.stride(), 0)


def like_keys(inputs: Inputs) -> Inputs:
    v = inputs.v
    outside = 1 + sum((n - 1) * stride for n, stride in zip(v.shape, inputs.k.stride(), strict=True))
    room = v.untyped_storage().nbytes() // v.element_size() - v.storage_offset()
    return replace(inputs, v=v.as_strided(v.shape, inputs.k.stride())) if outside <= room else inputs


def fill_gaps(inputs: Inputs) -> Inputs:
    for x in (inputs.q, inputs.k, inputs.v):
        if not x.is_contiguous():
            kept = x.clone()
            torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).fill_(7)
            x.copy_(kept)
    return inputs


def refuse_unaligned(inputs: Inputs) -> Inputs:
    assert all(x.data_ptr() % 16 == 0 for x in (inputs.q, inputs.k, inputs.v)), "misaligned address"
    return inputs


@pytest.mark.parametrize(
    ("change", "memory", "v_memory", "message"),
    [
        (
            lambda i: replace(i, q=from_the_start(i.q), k=from_the_start(i.k), v=from_the_start(i.v)),
            "shifted",
            "shifted",
            "outside of the error budget",
        ),
        (refuse_unaligned, "shifted", "contiguous", "misaligned address"),
        (refuse_unaligned, "contiguous", "shifted", "misaligned address"),
        (like_keys, "heads_first", "interleaved", "outside of the error budget"),
        (fill_gaps, "interleaved", "contiguous", "memory between the elements of q was modified"),
        (fill_gaps, "contiguous", "sliced", "memory between the elements of v was modified"),
    ],
)
def test_mistakes_of_memory(
    change: Callable[[Inputs], Inputs], memory: str, v_memory: str, message: str
) -> None:
    problem = replace(PROBLEM, head_dim_v=8)
    wrong = changed(change)
    laws.matches_oracle(wrong, problem)
    laws.strides_change_nothing(attention, problem, memory, v_memory)  # type: ignore[arg-type]  # literals
    with pytest.raises(AssertionError, match=message):
        laws.strides_change_nothing(wrong, problem, memory, v_memory)  # type: ignore[arg-type]  # the same


def test_segments_that_nobody_attends_to_may_hold_nan() -> None:
    def times_zero(problem: Problem, inputs: Inputs) -> State:
        out, lse = attention(problem, inputs)
        return out + 0 * inputs.v.sum(), lse

    laws.matches_oracle(times_zero, PROBLEM)
    laws.unrelated_rows_change_nothing(attention, PROBLEM, PROBLEM)
    with pytest.raises(AssertionError, match="unrelated rows change nothing"):
        laws.unrelated_rows_change_nothing(times_zero, PROBLEM, PROBLEM)


@pytest.mark.parametrize(
    ("dtype", "through"), [(torch.bfloat16, torch.float16), (torch.float32, torch.float16)]
)
def test_values_beyond_another_type(dtype: torch.dtype, through: torch.dtype) -> None:
    def narrowed(problem: Problem, inputs: Inputs) -> State:
        v = inputs.v.to(through).to(dtype) if inputs.v.abs().max() > 100 else inputs.v
        return attention(problem, replace(inputs, v=v))

    problem = replace(PROBLEM, dtype=dtype)
    laws.matches_oracle(narrowed, problem)
    laws.out_is_linear_in_v(attention, problem)
    with pytest.raises(AssertionError, match=r"values 2\*\*40 times as large"):
        laws.out_is_linear_in_v(narrowed, problem)


def test_the_next_segment_may_hold_nan() -> None:
    """What a tile reads behind the last key counts with weight 0, and 0 times NaN is NaN."""

    def reads_on(problem: Problem, inputs: Inputs) -> State:
        out, lse = attention(problem, inputs)
        behind = inputs.v[sum(problem.kv_lens[: problem.row_to_node[-1] + 1]) :][:16]
        return out + 0 * behind.sum(), lse

    other = Problem((-1,), (4,), (0,), (1,))
    laws.matches_oracle(reads_on, PROBLEM)
    laws.unrelated_rows_change_nothing(attention, PROBLEM, other)
    laws.unrelated_rows_change_nothing(reads_on, PROBLEM, other, poison=False)
    with pytest.raises(AssertionError, match="outside of the error budget"):
        laws.unrelated_rows_change_nothing(reads_on, PROBLEM, other)


def test_keys_lie_otherwise_than_queries_and_may_be_one_head() -> None:
    problem = replace(PROBLEM, head_dim_v=8, num_q_heads=2)

    def like_queries(problem: Problem, inputs: Inputs) -> State:
        k = inputs.k
        fits = 1 + sum((n - 1) * s for n, s in zip(k.shape, inputs.q.stride(), strict=True)) <= k.numel()
        return attention(
            problem, replace(inputs, k=k.as_strided(k.shape, inputs.q.stride())) if fits else inputs
        )

    laws.strides_change_nothing(like_queries, problem, "contiguous", "sliced", "contiguous")
    with pytest.raises(AssertionError, match="outside of the error budget"):
        laws.strides_change_nothing(like_queries, problem, "contiguous", "contiguous", "heads_first")

    def heads_apart(problem: Problem, inputs: Inputs) -> State:
        k = inputs.k
        near = k.stride(1) == 0 and k.shape[0] > 1  # reads the next token's head where the stride is 0
        return attention(problem, replace(inputs, k=k.roll(1, 0)) if near else inputs)

    laws.equal_heads_may_lie_in_one_place(attention, problem)
    laws.strides_change_nothing(heads_apart, problem, "heads_first")
    with pytest.raises(AssertionError, match="one head of keys and values, expanded"):
        laws.equal_heads_may_lie_in_one_place(heads_apart, problem)


def test_tables_of_pages_change_and_pools_have_strides() -> None:
    planned: dict[Problem, torch.Tensor] = {}

    def paged(problem: Problem, inputs: Inputs, *, stale: bool = False, packed: bool = False) -> State:
        pages = inputs.pages
        assert pages is not None
        table = planned.setdefault(problem, pages.page_indices.clone()) if stale else pages.page_indices
        caches = [pages.k_cache, pages.v_cache]
        if packed:
            caches = [
                x.as_strided(x.shape, torch.empty(x.shape).stride(), x.storage_offset()) for x in caches
            ]
        parts: list[list[torch.Tensor]] = [[], []]
        for node, kv_len in enumerate(problem.kv_lens):
            own = table[pages.page_indptr[node] : pages.page_indptr[node + 1]].long()
            own = own.clamp(max=len(caches[0]) - 1)  # a pool may be smaller the second time
            for part, cache in zip(parts, caches, strict=True):
                part.append(cache[own].flatten(0, 1)[:kv_len])
        k, v = (torch.cat(part) for part in parts)
        return attention(problem, replace(inputs, k=k, v=v, pages=None))

    for pool in ("apart", "together", "heads_first"):
        laws.paging_changes_nothing(paged, PROBLEM, 2, 0, pool, "interleaved")
    laws.paging_changes_nothing(lambda p, i: paged(p, i, packed=True), PROBLEM, 2, 0, "apart")
    with pytest.raises(AssertionError, match="outside of the error budget"):
        laws.paging_changes_nothing(lambda p, i: paged(p, i, packed=True), PROBLEM, 2, 0, "heads_first")
    with pytest.raises(AssertionError, match="outside of the error budget"):
        laws.paging_changes_nothing(lambda p, i: paged(p, i, stale=True), PROBLEM, 2)
    with pytest.raises(ValueError, match="pool must be one of apart, together, heads_first, got 'x'"):
        laws.paging_changes_nothing(paged, PROBLEM, 2, 0, "x")  # type: ignore[arg-type]  # wrong on purpose


def test_the_budget_is_the_same_whatever_precision_the_judged_ask_for() -> None:
    problem = Problem((-1, 0), (60, 9), (1, 1), (3, 2), 4, 2, 64, 64, sharpness="peaked", seed=3)
    expected = budget(problem, problem.tensors())
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert budget(problem, problem.tensors()) == expected
    finally:
        torch.set_float32_matmul_precision(before)

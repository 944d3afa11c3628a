"""What no number of drawn examples makes sure of: single sizes, memory, magnitudes; each with its bug."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from faulty_attention import attention

from hydragen.testing import Inputs, Problem, laws
from hydragen.testing.conformance.capabilities import Capabilities
from hydragen.testing.conformance.corners import corners

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
    ],
)
def test_each_size_alone_is_tried(wrong: Callable[[Problem], bool]) -> None:
    assert any(wrong(problem) for problem in corners(Capabilities()))


def test_a_right_function_passes_them_and_one_that_is_wrong_somewhere_does_not() -> None:
    for problem in corners(Capabilities())[::7]:
        laws.matches_oracle(attention, problem)
    (problem,) = (problem for problem in corners(Capabilities()) if problem.kv_lens[0] == 256)

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
    found = corners(can)
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

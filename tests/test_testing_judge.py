"""The judge passes what is correct, and says where, by how much and for which problem a result is wrong."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from faulty_attention import attention

from hydragen.testing import Problem, assert_within_budget, budget, oracle, run
from hydragen.testing.budget import errors

PROBLEM = Problem(
    parents=(-1, 0, 0),
    kv_lens=(20, 3, 0),
    row_to_node=(1, 2),
    q_lens=(1, 2),
    num_q_heads=4,
    num_kv_heads=2,
    dtype=torch.float16,
)
EMPTY = replace(PROBLEM, kv_lens=(0, 3, 0))  # row 1 has nothing to attend to


def result(problem=PROBLEM):
    return run(attention, problem)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_correct_result_passes_and_nothing_is_returned(dtype):
    problem = replace(PROBLEM, dtype=dtype)
    assert assert_within_budget(problem, *result(problem)) is None
    assert_within_budget(problem, result(problem)[0])


def test_the_message_says_where_how_much_and_for_which_problem():
    out, lse = result()
    out[2, 3, 5] += 0.25
    with pytest.raises(AssertionError) as raised:
        assert_within_budget(PROBLEM, out, lse, law="halves are whole")
    text = str(raised.value)
    assert "out is outside of the error budget at row 1, query 1, head 3, dim 5" in text
    assert f"got       {float(out[2, 3, 5]):.9g}" in text
    assert f"expected  {float(oracle(PROBLEM).out[2, 3, 5]):.9g}" in text
    assert "x the budget" in text
    assert "1 of 96 values outside" in text
    assert "halves are whole" in text
    assert repr(PROBLEM) in text
    assert str(PROBLEM) in text


def test_an_error_is_measured_in_budgets_of_its_row():
    out, lse = result()
    allowed = budget(PROBLEM)[1].lse
    lse[2, 1] = oracle(PROBLEM).lse[2, 1] + 3 * allowed
    with pytest.raises(AssertionError, match=r"lse is outside.* row 1, query 1, head 1\n") as raised:
        assert_within_budget(PROBLEM, out, lse)
    assert float(str(raised.value).split(" x the budget")[0].split("= ")[-1]) == pytest.approx(3, rel=0.3)


def test_the_whole_of_the_budget_may_be_used():
    out, _ = result()
    expected = oracle(PROBLEM)
    signs = torch.where(torch.rand(out.shape) < 0.5, -1.0, 1.0)
    for share, passes in ((0.9, True), (1.5, False)):
        row_limits = torch.tensor([row.out for row in budget(PROBLEM)])[[0, 1, 1]]
        moved = expected.out + share * row_limits[:, None, None] * signs
        problem = replace(PROBLEM, dtype=torch.float64)
        inputs = PROBLEM.tensors()
        wide = replace(inputs, q=inputs.q.double(), k=inputs.k.double(), v=inputs.v.double())
        assert torch.equal(oracle(problem, wide).out, expected.out)
        outside = errors(moved, expected.out) > row_limits[:, None, None]
        assert bool(outside.any()) is not passes


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["out", "lse"])
def test_nan_and_infinities_never_pass_for_numbers(name, value):
    out, lse = result()
    (out if name == "out" else lse)[0, 0] = value
    with pytest.raises(AssertionError, match=f"{name} is outside"):
        assert_within_budget(PROBLEM, out, lse)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e30, 0.0])
def test_the_empty_row_must_be_minus_infinity(value):
    out, lse = result(EMPTY)
    assert_within_budget(EMPTY, out, lse)
    assert (lse[1:] == -math.inf).all()
    lse[1, 0] = value
    with pytest.raises(AssertionError, match="row 1, query 0, head 0"):
        assert_within_budget(EMPTY, out, lse)


def test_the_empty_row_must_be_zero():
    out, lse = result(EMPTY)
    out[2, 0, 0] = 1e-7
    with pytest.raises(AssertionError, match="inf x the budget"):
        assert_within_budget(EMPTY, out, lse)


def test_nan_passes_where_the_oracle_has_nan():
    inputs = PROBLEM.tensors()
    inputs.v[0, 0, 0] = math.nan
    out, lse = run(attention, PROBLEM, inputs)
    assert out.isnan().any()
    assert_within_budget(PROBLEM, out, lse, inputs=inputs)
    with pytest.raises(AssertionError, match="expected  nan"):
        assert_within_budget(PROBLEM, out.nan_to_num(), lse, inputs=inputs)


def test_dtype_comes_before_shape_and_shape_before_values():
    out, lse = result()
    wrong = out[:, :, :-1].float() + 1
    with pytest.raises(AssertionError, match=r"out.dtype is torch.float32, but should be torch.float16"):
        assert_within_budget(PROBLEM, wrong, lse)
    with pytest.raises(AssertionError, match=r"out.shape is \(3, 4, 7\), but should be \(3, 4, 8\)"):
        assert_within_budget(PROBLEM, wrong.half(), lse)
    with pytest.raises(AssertionError, match=r"lse.dtype is torch.float16, but should be torch.float32"):
        assert_within_budget(PROBLEM, out, lse.half())
    with pytest.raises(AssertionError, match=r"lse.shape is \(4, 3\), but should be \(3, 4\)"):
        assert_within_budget(PROBLEM, out, lse.T)


def test_inputs_must_stay_as_they_were():
    def careless(problem, inputs):
        inputs.k.mul_(0.5)
        return attention(problem, inputs)

    with pytest.raises(AssertionError, match="k was modified"):
        run(careless, PROBLEM)


def test_results_must_be_tensors():
    with pytest.raises(TypeError, match="got list for out"):
        run(lambda problem, inputs: [1.0], PROBLEM)
    with pytest.raises(TypeError, match="got int for lse"):
        run(lambda problem, inputs: (inputs.q, 3), PROBLEM)
    out, lse = run(lambda problem, inputs: inputs.q, PROBLEM)
    assert lse is None
    assert out.shape == PROBLEM.tensors().q.shape


def test_the_budget_grows_with_the_inputs_eps_and_not_with_other_rows():
    of_dtype = {
        dtype: budget(replace(PROBLEM, dtype=dtype))[0]
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    }
    outs = [row.out for row in of_dtype.values()]
    assert outs == sorted(outs)
    assert outs[0] < 1e-13
    assert outs[-1] < 0.1
    lopsided = [replace(PROBLEM, sharpness="lopsided", seed=seed) for seed in range(10)]
    assert any(max(b.logits for b in budget(p)) > 100 * min(b.logits for b in budget(p)) for p in lopsided)


def test_the_oracle_is_run_once_for_a_problem():
    assert oracle(PROBLEM) is oracle(replace(PROBLEM))
    inputs = PROBLEM.tensors()
    assert oracle(PROBLEM, inputs) is oracle(PROBLEM, inputs)
    assert oracle(PROBLEM, inputs) is not oracle(PROBLEM)


def test_rounding_partials_to_half_precision_is_outside_for_float32():
    problem = replace(PROBLEM, dtype=torch.float32)
    faulty = functools.partial(attention, bug="partials in half precision")
    with pytest.raises(AssertionError, match="out is outside"):
        assert_within_budget(problem, *run(faulty, problem))

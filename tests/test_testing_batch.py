"""Judging on the device is the same as judging with the NumPy oracle, row by row."""

from dataclasses import replace

import pytest
import torch
from faulty_attention import attention
from hypothesis import HealthCheck, Phase, given, settings

from hydragen.testing import Problem, budget, oracle, problems
from hydragen.testing.batch import check_oracle, judge_rows
from hydragen.testing.budget import errors
from hydragen.testing.problem import DTYPES

some = settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
PROBLEM = Problem((-1, 0, 0, -1), (20, 3, 0, 0), (1, 2, 3), (1, 2, 2), 4, 2, causal=True, dtype=torch.float16)


@some
@given(problems(dtypes=DTYPES, max_kv=70))
def test_the_oracle_and_the_budgets_are_numpys(problem):
    assert check_oracle(problem, problem.tensors(), "cpu") <= 1


@some
@given(problems(max_kv=70))
def test_ratios_are_errors_over_budgets(problem):
    inputs = problem.tensors()
    out, lse = attention(problem, inputs)
    judged = judge_rows(problem, inputs, out, lse)
    assert judged.failing_rows == []
    expected, lengths = oracle(problem), list(problem.q_lens)
    rows = zip(budget(problem), errors(lse, expected.lse).split(lengths), judged.lse.tolist(), strict=True)
    for row, error, ratio in rows:
        # budgets differ by the dense error, which depends on the order of sums
        assert ratio * row.lse == pytest.approx(float(error.max()), rel=0.7, abs=1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3.0])
def test_a_wrong_row_is_found_and_no_other(value):
    inputs = PROBLEM.tensors()
    out, lse = attention(PROBLEM, inputs)
    out[1, 3, 5] = value
    assert judge_rows(PROBLEM, inputs, out, lse).failing_rows == [1]
    lse[3, 0] = value
    assert judge_rows(PROBLEM, inputs, out, lse).failing_rows == [1, 2]
    assert judge_rows(PROBLEM, inputs, out, None).failing_rows == [1]


def test_a_wrong_oracle_is_found(monkeypatch):
    inputs = PROBLEM.tensors()
    assert check_oracle(PROBLEM, inputs, "cpu") <= 1
    other = replace(PROBLEM, causal=False)
    monkeypatch.setattr("hydragen.testing.batch.compute_oracle", lambda *_: oracle(other, inputs))
    assert check_oracle(PROBLEM, inputs, "cpu") > 1


def test_results_of_another_kind_are_refused():
    inputs = PROBLEM.tensors()
    out, lse = attention(PROBLEM, inputs)
    with pytest.raises(ValueError, match=r"out must be torch\.float16"):
        judge_rows(PROBLEM, inputs, out.float(), lse)
    with pytest.raises(ValueError, match=r"lse must be torch\.float32"):
        judge_rows(PROBLEM, inputs, out, lse.T)

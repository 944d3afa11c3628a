"""Shrinking keeps what fails, and leaves nothing over that it does not need."""

import pytest
import torch

from hydragen.testing import Problem, shrink
from hydragen.testing.shrink import simpler

LARGE = Problem(
    parents=(-1, 0, 0, 1, -1),
    kv_lens=(40, 17, 0, 5, 9),
    row_to_node=(3, 2, 4, 1, 3),
    q_lens=(2, 1, 4, 6, 1),
    num_q_heads=12,
    num_kv_heads=2,
    head_dim=33,
    head_dim_v=16,
    dtype=torch.bfloat16,
    causal=True,
    window=7,
    softcap=5.0,
    sinks=True,
    sharpness="peaked",
    seed=9,
)


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        (lambda p: True, Problem((-1,), (0,), (0,), (1,), head_dim=1, head_dim_v=1)),
        (lambda p: max(p.kv_lens) > 16, Problem((-1,), (17,), (0,), (1,), head_dim=1, head_dim_v=1)),
        (lambda p: p.num_rows > 1, Problem((-1,), (0,), (0, 0), (1, 1), head_dim=1, head_dim_v=1)),
        (
            lambda p: len({p.path(row)[0] for row in range(p.num_rows)}) > 1,
            Problem((-1, -1), (0, 0), (1, 0), (1, 1), head_dim=1, head_dim_v=1),
        ),
        (
            lambda p: max(len(p.path(row)) for row in range(p.num_rows)) > 2,
            Problem((-1, 0, 1), (0, 0, 0), (2,), (1,), head_dim=1, head_dim_v=1),
        ),
        (
            lambda p: p.window is not None and p.window < p.path_len(0),
            Problem((-1,), (2,), (0,), (1,), head_dim=1, head_dim_v=1, window=1),
        ),
        (
            lambda p: p.group_size > 2 and p.dtype == torch.bfloat16,
            Problem((-1,), (0,), (0,), (1,), 3, 1, 1, 1, torch.bfloat16),
        ),
    ],
)
def test_the_smallest_problem_that_fails(fails, expected):
    assert shrink(LARGE, fails) == expected


def test_runs_are_bounded_and_no_problem_is_tried_twice():
    tried = []
    smallest = shrink(
        LARGE, lambda problem: tried.append(problem) is None and problem.num_rows > 2, max_runs=20
    )
    assert len(tried) == len(set(tried)) == 20
    assert smallest.num_rows == 3


def test_every_step_is_a_problem_of_no_larger_size():
    for problem in simpler(LARGE):
        assert problem != LARGE
        assert problem.num_nodes <= LARGE.num_nodes
        assert problem.total_q <= LARGE.total_q
        problem.tensors()


def test_a_problem_that_passes_is_refused():
    with pytest.raises(ValueError, match="problem must fail, but does not"):
        shrink(LARGE, lambda problem: False)

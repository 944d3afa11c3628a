"""The oracle itself obeys the laws: each transform leaves its result as it is."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydragen.testing import Problem, problems, transforms
from hydragen.testing.budget import compute_oracle
from hydragen.testing.laws import companion

codes = st.integers(0, 10**6)
small = problems(head_dims=(1, 3), group_sizes=(1, 3), max_kv=20, max_q_len=3, dtypes=(torch.float32,))
few = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def assert_same(problem, inputs, case, places=slice(None)):
    before, after = compute_oracle(problem, inputs), compute_oracle(*case)
    torch.testing.assert_close(after.out[places], before.out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after.lse[places], before.lse, rtol=1e-12, atol=1e-12)


@few
@given(small, codes, codes)
def test_cut(problem, node, at):
    inputs, node = problem.tensors(), node % problem.num_nodes
    case = transforms.cut(problem, inputs, node, at % (problem.kv_lens[node] + 1))
    assert case[0].num_nodes == problem.num_nodes + 1
    assert case[1].k is inputs.k
    assert_same(problem, inputs, case)


@few
@given(small, codes)
def test_empty_segments(problem, node):
    inputs, node = problem.tensors(), node % problem.num_nodes
    assert_same(problem, inputs, transforms.splice_empty(problem, inputs, node))
    above = transforms.add_empty_root(problem, inputs)
    assert above[0].parents.count(-1) == 1
    assert_same(problem, inputs, above)


@few
@given(small, codes)
def test_unshare(problem, node):
    inputs, node = problem.tensors(), node % problem.num_nodes
    case = transforms.unshare(problem, inputs, node)
    assert case[0].kv_lens[node] == 0
    assert_same(problem, inputs, case)


@few
@given(small)
def test_flatten(problem):
    inputs = problem.tensors()
    case = transforms.flatten(problem, inputs)
    assert set(case[0].parents) == {-1}
    assert case[0].row_to_node == tuple(range(problem.num_rows))
    assert_same(problem, inputs, case)


@few
@given(small, st.lists(codes, min_size=8, max_size=8))
def test_permute_rows(problem, keys):
    inputs = problem.tensors()
    order = sorted(range(problem.num_rows), key=lambda row: keys[row])
    case = transforms.permute_rows(problem, inputs, order)
    assert_same(problem, inputs, case, torch.argsort(transforms.query_tokens(problem, order)))


@few
@given(small, small)
def test_add_unrelated(problem, other):
    inputs, other = problem.tensors(), companion(problem, other)
    case = transforms.add_unrelated(problem, inputs, other, other.tensors())
    assert_same(problem, inputs, case, slice(other.total_q, None))


@few
@given(problems(softcap=False, sinks=False, head_dims=(1, 3), max_kv=20))
def test_shift_of_logits(problem):
    inputs = problem.tensors()
    constant = torch.full((problem.num_kv_heads, problem.head_dim), 0.5, dtype=problem.dtype)
    k = transforms.on_grid(inputs.k)
    before = compute_oracle(problem, transforms.replace(inputs, k=k))
    after = compute_oracle(problem, transforms.replace(inputs, k=k + constant))
    shift = transforms.shift_of_logits(problem, inputs, constant)
    torch.testing.assert_close(after.lse, before.lse + shift, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(after.out, before.out, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_on_the_grid_are_exact(dtype):
    x, y = (transforms.on_grid(torch.randn(1000).to(dtype) * 3) for _ in range(2))
    assert torch.equal((x + y).double(), x.double() + y.double())
    assert torch.equal((2 * x - y).double(), 2 * x.double() - y.double())


def test_wrong_arguments_are_named():
    problem = Problem((-1,), (3,), (0, 0), (1, 1))
    inputs = problem.tensors()
    with pytest.raises(ValueError, match="node must be at least 0 and below 1, got 1"):
        transforms.cut(problem, inputs, 1, 0)
    with pytest.raises(ValueError, match="at must be at least 0 and below 4, got 4"):
        transforms.cut(problem, inputs, 0, 4)
    with pytest.raises(ValueError, match="order must be a permutation of 2 rows"):
        transforms.permute_rows(problem, inputs, [0, 0])
    other = Problem((-1,), (3,), (0,), (1,), head_dim=4)
    with pytest.raises(ValueError, match="head_dim must be the problem's, 8, got 4"):
        transforms.add_unrelated(problem, inputs, other, other.tensors())


@pytest.mark.parametrize("trees", ["none", "prefix"])
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_permuted_rows_take_their_own_segments_along(trees, data):
    """So that row i stays at segment i, or i + 1, for a function that knows nothing else."""
    problem = data.draw(problems(trees=trees))
    order = data.draw(st.permutations(range(problem.num_rows)))
    inputs = problem.tensors()
    changed, moved = transforms.permute_rows(problem, inputs, order, nodes_along=True)
    assert changed.parents == problem.parents
    assert changed.row_to_node == problem.row_to_node
    expected = compute_oracle(problem, inputs)
    tokens = transforms.query_tokens(problem, order)
    found = compute_oracle(changed, moved)
    assert torch.equal(found.out, expected.out[tokens])
    assert torch.equal(found.lse, expected.lse[tokens])


def test_rows_that_share_a_segment_cannot_take_it_along():
    problem = Problem((-1, 0), (3, 1), (1, 1), (1, 1))
    for shared in (problem, Problem((-1, 0), (3, 1), (0, 1), (1, 1))):
        with pytest.raises(ValueError, match="problem must have a node for each row alone"):
            transforms.permute_rows(shared, shared.tensors(), [1, 0], nodes_along=True)

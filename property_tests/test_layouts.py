"""hydragen's own interfaces: every layout of keys and values, whatever lies in unused memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import subjects
import torch
from hypothesis import given
from hypothesis import strategies as st

import hydragen
from hydragen.testing import Inputs, Problem, assert_within_budget, laws, view
from hydragen.testing.adapters.ours import attend
from hydragen.testing.conformance.subject import problems
from hydragen.testing.views import KV_LAYOUTS, MEMORY


@pytest.fixture(params=subjects.backends(), scope="module")
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def on_device(lengths: Any, device: str) -> Any:
    """The same lengths as int32 tensors that nothing reads back."""
    if lengths and isinstance(lengths[0], list):
        return [torch.tensor(level, dtype=torch.int32, device=device) for level in lengths]
    return torch.tensor(lengths, dtype=torch.int32, device=device)


@given(
    problems(),
    st.sampled_from(KV_LAYOUTS),
    st.sampled_from([0, 1, 17]),
    st.sampled_from(MEMORY),
    st.booleans(),
)
def test_every_layout_matches_the_oracle(backend, problem, kv_layout, spare, memory, lens_on_device) -> None:
    def implementation(problem: Problem, inputs: Inputs) -> Any:
        inputs = inputs.to(subjects.device_of(backend))
        made = view(problem, inputs, kv_layout, spare=spare, memory=memory)
        if lens_on_device and made.kv_lens is not None:
            made = replace(made, kv_lens=on_device(made.kv_lens, subjects.device_of(backend)))
        return attend(problem, inputs, made, backend=backend)

    laws.matches_oracle(implementation, problem)


@st.composite
def equal_groups(draw: st.DrawFn) -> Problem:
    """A problem whose tree need not be stated: every node of a level has equally many children."""
    problem = draw(problems(max_nodes=1, max_rows=1))
    branching = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    lengths = draw(st.lists(st.integers(0, 20), min_size=13 * 3, max_size=13 * 3))
    parents, level = [], [-1]
    for children in branching:
        above, level = level, []
        for parent in above:
            level += range(len(parents), len(parents) + children)
            parents += [parent] * children
    rows_per_leaf = draw(st.integers(1, 2))
    row_to_node = [leaf for leaf in level for _ in range(rows_per_leaf)]
    return replace(
        problem,
        parents=tuple(parents),
        kv_lens=tuple(lengths[: len(parents)]),
        row_to_node=tuple(row_to_node),
        q_lens=problem.q_lens * len(row_to_node),
    )


@given(equal_groups())
def test_levels_of_equal_groups_need_no_tree(backend, problem) -> None:
    def implementation(problem: Problem, inputs: Inputs) -> Any:
        inputs = inputs.to(subjects.device_of(backend))
        made = problem.as_levels(inputs)
        return attend(problem, inputs, replace(made, tree=None), backend=backend)

    laws.matches_oracle(implementation, problem)


@given(problems())
def test_packed_rows_without_a_tree_share_nothing(backend, problem) -> None:
    nodes = range(problem.num_nodes)
    problem = replace(
        problem,
        parents=(-1,) * len(nodes),
        row_to_node=tuple(nodes),
        q_lens=tuple(problem.q_lens[node % problem.num_rows] for node in nodes),
    )

    def implementation(problem: Problem, inputs: Inputs) -> Any:
        inputs = inputs.to(subjects.device_of(backend))
        return attend(problem, inputs, replace(problem.as_packed(inputs), tree=None), backend=backend)

    laws.matches_oracle(implementation, problem)


@given(problems(), problems(max_nodes=3, max_rows=3))
def test_unrelated_rows_change_no_bits_if_batch_invariant(backend, problem, other) -> None:
    laws.unrelated_rows_change_no_bits(subjects.hydragen_with(backend, batch_invariant=True), problem, other)


@given(problems(dtypes=(torch.float64,)))
def test_float64_is_computed_in_float64(problem) -> None:
    laws.matches_oracle(subjects.hydragen_with("reference"), problem)


@given(problems())
def test_out_alone_is_the_same_out(backend, problem) -> None:
    inputs = problem.tensors(subjects.device_of(backend))
    made = problem.as_packed(inputs)
    out = hydragen.attention(
        made.q,
        made.kv,
        tree=made.tree,
        cu_seqlens_q=made.cu_seqlens_q,
        backend=backend,
        **problem.options(inputs),
    )
    assert_within_budget(problem, out)

"""The laws of exact attention (hydragen.testing.laws), each for every implementation under test."""

from hypothesis import given
from hypothesis import strategies as st
from subjects import problems

from hydragen.testing import Implementation, Problem, laws
from hydragen.testing.views import MEMORY

codes = st.integers(0, 10**6)  # reduced modulo the number of choices


@given(problems())
def test_out_and_lse_match_the_oracle(implementation: Implementation, problem: Problem) -> None:
    laws.matches_oracle(implementation, problem)


@given(problems(), codes, codes)
def test_a_segment_may_be_cut_anywhere(
    implementation: Implementation, problem: Problem, node: int, at: int
) -> None:
    node %= problem.num_nodes
    laws.cutting_changes_nothing(implementation, problem, node, at % (problem.kv_lens[node] + 1))


@given(problems(), codes)
def test_an_empty_segment_changes_nothing(
    implementation: Implementation, problem: Problem, node: int
) -> None:
    laws.empty_segments_change_nothing(implementation, problem, node % problem.num_nodes)


@given(problems(), codes)
def test_unsharing_changes_nothing(implementation: Implementation, problem: Problem, node: int) -> None:
    laws.unsharing_changes_nothing(implementation, problem, node % problem.num_nodes)


@given(problems())
def test_a_tree_equals_its_flattening(implementation: Implementation, problem: Problem) -> None:
    laws.flattening_changes_nothing(implementation, problem)


@given(problems(), st.lists(codes, min_size=8, max_size=8))
def test_permuting_rows_permutes_results(
    implementation: Implementation, problem: Problem, keys: list[int]
) -> None:
    order = sorted(range(problem.num_rows), key=lambda row: keys[row % len(keys)])
    laws.permuting_rows_permutes_results(implementation, problem, order)


@given(problems(), problems(max_nodes=3, max_rows=3))
def test_unrelated_rows_change_nothing(
    implementation: Implementation, problem: Problem, other: Problem
) -> None:
    laws.unrelated_rows_change_nothing(implementation, problem, other)


@given(problems(), st.sampled_from(MEMORY))
def test_strides_change_nothing(implementation: Implementation, problem: Problem, memory: str) -> None:
    laws.strides_change_nothing(implementation, problem, memory)


@given(problems(softcap=False, sinks=False), st.integers(0, 2**16))
def test_a_constant_added_to_all_keys_shifts_lse_only(
    implementation: Implementation, problem: Problem, seed: int
) -> None:
    laws.shifting_keys_shifts_lse(implementation, problem, seed)


@given(problems())
def test_out_is_linear_in_v(implementation: Implementation, problem: Problem) -> None:
    laws.out_is_linear_in_v(implementation, problem)


@given(problems())
def test_two_runs_give_the_same_bits(implementation: Implementation, problem: Problem) -> None:
    laws.runs_give_the_same_bits(implementation, problem)

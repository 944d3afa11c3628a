"""The laws of exact attention (`hydragen.testing.laws`), each for every implementation under test.

`needs` names the capabilities without which a law cannot be asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from hydragen.testing import Implementation, Problem, laws
from hydragen.testing.conformance.capabilities import Capabilities
from hydragen.testing.conformance.corners import parts
from hydragen.testing.conformance.known import Entry
from hydragen.testing.conformance.subject import large_problems, problems, session
from hydragen.testing.pages import PAGE_SIZES, POOLS, Pool
from hydragen.testing.tally import saw_refusal
from hydragen.testing.views import MEMORY, Memory

codes = st.integers(0, 10**6)  # reduced modulo the number of choices


@pytest.mark.needs
@given(problems())
def test_out_and_lse_match_the_oracle(implementation: Implementation, problem: Problem) -> None:
    laws.matches_oracle(implementation, problem)


@contextmanager
def refusals_counted() -> Iterator[None]:
    """What the function would not do is left out, as where problems are drawn."""
    try:
        yield
    except NotImplementedError as error:
        saw_refusal(str(error))


fewer = settings(max_examples=max(5, settings().max_examples // 3))  # of what takes longer


@pytest.mark.needs
@fewer
@given(large_problems())
def test_large_problems_match_the_oracle(implementation: Implementation, problem: Problem) -> None:
    laws.matches_oracle(implementation, problem)


CORNERS = {
    name: [problem for problem in part if session.known.allows(problem)]
    for name, part in parts(session.capabilities, 1 if settings().max_examples >= 100 else 7).items()
}


@pytest.mark.needs
@pytest.mark.parametrize("part", CORNERS.values(), ids=CORNERS)
def test_corners_match_the_oracle(implementation: Implementation, part: list[Problem]) -> None:
    for problem in part:
        with refusals_counted():
            laws.matches_oracle(implementation, problem)


@pytest.mark.needs(paged=[True])
@pytest.mark.parametrize("part", CORNERS.values(), ids=CORNERS)
def test_corners_match_the_oracle_in_pages(implementation: Implementation, part: list[Problem]) -> None:
    for number, problem in enumerate(part[::4]):
        page_size, pool = PAGE_SIZES[number % len(PAGE_SIZES)], POOLS[number % len(POOLS)]
        with refusals_counted():
            laws.paging_changes_nothing(implementation, problem, page_size, number, pool)


@pytest.mark.needs(trees=["any", "none"])
@fewer
@given(problems(), st.booleans())
def test_many_copies_change_nothing(implementation: Implementation, problem: Problem, shared: bool) -> None:
    can = session.capabilities
    most = 48 if can.max_rows == Capabilities.max_rows else can.max_rows
    copies = min(1 + 16 // min(problem.num_rows, problem.num_nodes), max(1, most // problem.num_rows))
    laws.copies_change_nothing(implementation, problem, copies, shared=shared and can.trees == "any")


@pytest.mark.needs(trees=["any"], empty=[True])
@given(problems(), codes, codes)
def test_a_segment_may_be_cut_anywhere(
    implementation: Implementation, problem: Problem, node: int, at: int
) -> None:
    node %= problem.num_nodes
    laws.cutting_changes_nothing(implementation, problem, node, at % (problem.kv_lens[node] + 1))


@pytest.mark.needs(trees=["any"], empty=[True])
@given(problems(), codes)
def test_an_empty_segment_changes_nothing(
    implementation: Implementation, problem: Problem, node: int
) -> None:
    laws.empty_segments_change_nothing(implementation, problem, node % problem.num_nodes)


@pytest.mark.needs(trees=["any"], empty=[True])
@given(problems(), codes)
def test_unsharing_changes_nothing(implementation: Implementation, problem: Problem, node: int) -> None:
    laws.unsharing_changes_nothing(implementation, problem, node % problem.num_nodes)


@pytest.mark.needs(trees=["any"])
@given(problems())
def test_a_tree_equals_its_flattening(implementation: Implementation, problem: Problem) -> None:
    laws.flattening_changes_nothing(implementation, problem)


@pytest.mark.needs
@given(problems(), st.lists(codes, min_size=8, max_size=8))
def test_permuting_rows_permutes_results(
    implementation: Implementation, problem: Problem, keys: list[int]
) -> None:
    order = sorted(range(problem.num_rows), key=lambda row: keys[row % len(keys)])
    along = session.capabilities.trees != "any"
    laws.permuting_rows_permutes_results(implementation, problem, order, nodes_along=along)


@pytest.mark.needs(trees=["any", "none"])
@given(problems(), problems(max_nodes=3, max_rows=3))
def test_unrelated_rows_change_nothing(
    implementation: Implementation, problem: Problem, other: Problem
) -> None:
    if session.capabilities.same_q_len:
        other = replace(other, q_lens=problem.q_lens[:1] * other.num_rows)
    can = session.capabilities
    poison = can.poison and can.trees == "any"  # otherwise somebody attends to every segment
    laws.unrelated_rows_change_nothing(implementation, problem, other, poison=poison)


memories = st.sampled_from(MEMORY)


@pytest.mark.needs(strides=[True])
@given(problems(), memories, memories, memories)
def test_strides_change_nothing(
    implementation: Implementation, problem: Problem, memory: Memory, v_memory: Memory, k_memory: Memory
) -> None:
    laws.strides_change_nothing(implementation, problem, memory, v_memory, k_memory)


if session.capabilities.max_kv_heads > 1:

    @pytest.mark.needs(strides=[True])
    @fewer
    @given(problems(), st.integers(2, session.capabilities.max_kv_heads))
    def test_equal_heads_may_lie_in_one_place(
        implementation: Implementation, problem: Problem, heads: int
    ) -> None:
        problem = replace(problem, num_kv_heads=heads, num_q_heads=heads * problem.group_size)
        laws.equal_heads_may_lie_in_one_place(implementation, problem)


@pytest.mark.needs(paged=[True])
@given(problems(), st.sampled_from(PAGE_SIZES), codes, st.sampled_from(POOLS), memories)
def test_paging_changes_nothing(
    implementation: Implementation, problem: Problem, page_size: int, seed: int, pool: Pool, memory: Memory
) -> None:
    if not session.capabilities.strides:
        pool, memory = POOLS[0], MEMORY[0]
    laws.paging_changes_nothing(implementation, problem, page_size, seed, pool, memory)


@pytest.mark.needs(softcap=["yes", "no"], sinks=["yes", "no"])
@given(problems(softcap=False, sinks=False), st.integers(0, 2**16))
def test_a_constant_added_to_all_keys_shifts_lse_only(
    implementation: Implementation, problem: Problem, seed: int
) -> None:
    laws.shifting_keys_shifts_lse(implementation, problem, seed)


@pytest.mark.needs
@given(problems())
def test_out_is_linear_in_v(implementation: Implementation, problem: Problem) -> None:
    laws.out_is_linear_in_v(implementation, problem)


@pytest.mark.needs(repeatable=[True])
@given(problems())
def test_two_runs_give_the_same_bits(implementation: Implementation, problem: Problem) -> None:
    laws.runs_give_the_same_bits(implementation, problem)


if session.known.failing_problems:

    def test_known_failures_still_fail(implementation: Implementation, known_failure: Entry) -> None:
        """A kind of problem that is listed as failing must fail, or leave the list."""

        @settings(
            phases=[Phase.generate],
            database=None,
            suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
        )
        @given(session.capabilities.problems().filter(functools.partial(session.known.only, known_failure)))
        def holds(problem: Problem) -> None:
            laws.matches_oracle(implementation, problem)
            can = session.capabilities
            for page_size in PAGE_SIZES if can.paged else ():
                laws.paging_changes_nothing(implementation, problem, page_size, problem.seed)
            for memory in MEMORY if can.strides else ():
                laws.strides_change_nothing(implementation, problem, memory)
            if can.repeatable:
                laws.runs_give_the_same_bits(implementation, problem)

        try:
            holds()
        except Unsatisfiable:
            pytest.fail(f"no problem was drawn for which {known_failure.when}: remove the entry, or widen it")
        except Exception as error:
            if not known_failure.expects(error):
                raise  # not what is listed
            return
        pytest.fail(known_failure.repaired())

"""The judge catches every mistake of `faulty_attention` within CI's examples, and passes it without one.

Planted in an implementation written for this purpose, so that no change of hydragen can disarm a bug.
"""

import functools

import pytest
import torch
from faulty_attention import TILE, attention
from faulty_bugs import BUGS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hydragen.testing import Inputs, Problem, laws, problems, shrink
from hydragen.testing.conformance.plugin import EXAMPLES
from hydragen.testing.views import MEMORY, Memory

CI_EXAMPLES = 150  # of profile ci
PROBLEM = Problem((-1, 0), (5, 2), (1, 0), (1, 2))

search = settings(
    max_examples=CI_EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_the_number_of_examples_is_that_of_ci():
    assert EXAMPLES["ci"] == CI_EXAMPLES


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_the_judge_catches_it(bug):
    """Within CI's examples, and shrunk to a few tokens, or to just over a tile where it needs two of them."""
    implementation = functools.partial(attention, bug=bug)
    caught: list[Problem] = []

    @search
    @given(problems(), st.sampled_from(MEMORY))
    def law(problem: Problem, memory: Memory) -> None:
        try:
            if bug in (None, "strides ignored"):
                laws.strides_change_nothing(implementation, problem, memory)
            if bug is None or "page" in bug:
                laws.paging_changes_nothing(implementation, problem, page_size=3, seed=problem.seed)
            if bug != "strides ignored":
                laws.matches_oracle(implementation, problem)
        except AssertionError:
            caught.append(problem)
            raise

    if bug is None:
        law()
        return
    with pytest.raises(AssertionError, match="outside of the error budget"):
        law()
    smallest = shrink(caught[0], lambda problem: fails(implementation, bug, problem))
    assert smallest.num_nodes <= 3
    crosses = TILE if bug in NEED_TWO_TILES else 0
    assert smallest.total_kv + smallest.total_q <= 8 + crosses, smallest


NEED_TWO_TILES = {"running sum not rescaled"}


def fails(implementation, bug: str, problem: Problem) -> bool:
    try:
        if bug == "strides ignored":
            laws.strides_change_nothing(implementation, problem, "sliced")
        elif "page" in bug:
            laws.paging_changes_nothing(implementation, problem, page_size=3, seed=problem.seed)
        else:
            laws.matches_oracle(implementation, problem)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize(
    ("law", "bug"),
    [
        (laws.flattening_changes_nothing, "running sum not rescaled"),
        (
            lambda run, p: laws.cutting_changes_nothing(run, p, 0, p.kv_lens[0] // 2),
            "window counted per segment",
        ),
        (lambda run, p: laws.empty_segments_change_nothing(run, p, 0), "empty segment has a finite lse"),
        (lambda run, p: laws.unsharing_changes_nothing(run, p, 0), "tile remainder dropped"),
        (
            lambda run, p: laws.permuting_rows_permutes_results(run, p, range(p.num_rows)[::-1]),
            "rows in tree order",
        ),
        (lambda run, p: laws.unrelated_rows_change_nothing(run, p, p), "only one root"),
        (laws.out_is_linear_in_v, "GQA heads interleaved"),
        (
            lambda run, p: p.softcap or p.sinks or laws.shifting_keys_shifts_lse(run, p),
            "returned lse in base 2",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_law_catches_something(law, bug):
    faulty = functools.partial(attention, bug=bug)

    @search
    @given(problems())
    def hold(problem: Problem) -> None:
        law(faulty, problem)

    with pytest.raises(AssertionError, match="outside of the error budget"):
        hold()


def test_results_that_differ_from_run_to_run_are_caught():
    def fickle(problem: Problem, inputs: Inputs) -> torch.Tensor:
        out, _ = attention(problem, inputs)
        return out + torch.rand(()).to(out.dtype)

    with pytest.raises(AssertionError, match="two runs give the same bits"):
        laws.runs_give_the_same_bits(fickle, PROBLEM)


def test_results_that_depend_on_the_batch_are_caught():
    def dependent(problem: Problem, inputs: Inputs) -> torch.Tensor:
        out, _ = attention(problem, inputs)
        return out * (1 + problem.num_rows * torch.finfo(out.dtype).eps)

    with pytest.raises(AssertionError, match="unrelated rows change no bits"):
        laws.unrelated_rows_change_no_bits(dependent, PROBLEM, PROBLEM)

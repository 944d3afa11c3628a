"""Bugs planted in the kernels and in the plan themselves, one at a time: the judge catches each.

In Triton's interpreter, on a handful of small problems that pass without a bug. The bugs are those that
shipped in such kernels, as far as they concern a kernel or its work table.
"""

from collections.abc import Iterator

import pytest
import test_bug_table
import torch
from kernel_bugs import BUGS, CROSSES_A_TILE, SHOWN_BY, SMALLEST

import hydragen
from hydragen import api
from hydragen.testing import Inputs, Problem, assert_within_budget, planted, run
from hydragen.testing.adapters.ours import triton
from hydragen.testing.bounds import checked_accesses
from hydragen.testing.pages import in_pages

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings(
        "ignore:(invalid value|overflow) encountered:RuntimeWarning"
    ),  # of the planted bugs
]

SMALL = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16, "head_dim_v": 16}
TREE = ((-1, 0, 0), (37, 18, 5), (1, 2, 2))
PROBLEMS = {
    "decoding": Problem(*TREE, (1, 1, 1), **SMALL, sharpness="peaked"),
    "masked": Problem(*TREE, (3, 1, 4), **SMALL, causal=True, window=20, sharpness="peaked"),
    "short window": Problem((-1, 0), (40, 20), (1, 1), (20, 3), **SMALL, causal=True, window=3),
    "causal": Problem((-1, 0), (40, 33), (1, 1), (33, 3), **SMALL, causal=True, sharpness="peaked"),
    "very negative": Problem(*TREE, (1, 2, 1), **SMALL, sharpness="very_negative"),
    "empty": Problem((-1, 0, -1), (0, 6, 0), (1, 2), (1, 1), **SMALL),
    "a run of three": Problem((-1, 0, 1), (21, 5, 9), (2,), (1,), **SMALL),
    "odd heads, merged": Problem(
        (-1, 0, 0), (70, 9, 5), (1, 2), (2, 1), 6, 2, 13, 7, softcap=2.0, sinks=True, sharpness="peaked"
    ),
    "odd heads": Problem(
        (-1, 0), (20, 9), (1,), (2,), 6, 2, 13, 7, softcap=2.0, sinks=True, sharpness="peaked"
    ),
    "several roots": Problem((-1, -1, 0, 1), (19, 33, 4, 3), (3, 2, 3), (1, 1, 1), **SMALL),
    "one partial": Problem((-1, -1), (21, 5), (0, 1), (1, 2), **SMALL, sinks=True),
}


def implementation(problem: Problem, inputs: Inputs) -> hydragen.AttentionState:
    with checked_accesses():  # a bug that reads or writes elsewhere is caught, and does not end the process
        return triton(problem, inputs)


@pytest.fixture(autouse=True)
def fresh_plans() -> Iterator[None]:
    """Plans made with a bug, and kernels compiled with one, must not outlive it."""
    if torch.cuda.is_available():
        pytest.skip("planted in the interpreter: compiled kernels keep what they were first compiled with")
    api._PLANS.clear()
    yield
    api._PLANS.clear()


@pytest.mark.parametrize("name", PROBLEMS)
def test_without_a_bug_everything_passes(name: str) -> None:
    assert_within_budget(PROBLEMS[name], *run(implementation, PROBLEMS[name]))


@pytest.mark.parametrize("bug", BUGS)
def test_the_judge_catches(bug: str) -> None:
    """With one of the problems above and with the smallest one: at most 3 segments and 8 tokens."""
    module, old, new = BUGS[bug]
    how = SHOWN_BY.get(bug, "")
    smallest = SMALLEST[bug]
    assert smallest.num_nodes <= 3
    assert smallest.total_kv + smallest.total_q <= 8 + 16 * (bug in CROSSES_A_TILE)
    assert not caught(smallest, how), "the smallest problem fails without the bug"
    api._PLANS.clear()
    with planted(module, old, new):
        assert caught(smallest, how)
        assert how or any(caught(problem) for problem in PROBLEMS.values())


def test_offsets_in_32_bits_are_caught() -> None:
    """Planted where a node's first element is found: more than 2**31 elements into its memory."""
    with (
        planted(
            "hydragen.kernels.segment",
            "k_head_ptr += slot.to(tl.int64) * stride_kn",
            "k_head_ptr += (slot * stride_kn).to(tl.int32).to(tl.int64)",
        ),
        checked_accesses(),
        pytest.raises(Exception, match="OutOfBoundsError"),
    ):
        test_bug_table.test_int32_offset_wraparound("triton", torch.device("cpu"))


def caught(problem: Problem, how: str = "") -> bool:
    inputs = problem.tensors()
    if how.startswith("pages of "):
        inputs = in_pages(problem, inputs, int(how.removeprefix("pages of ")), seed=2)
    elif how == "strides":
        inputs = inputs.with_memory("interleaved")
    try:
        assert_within_budget(problem, *run(implementation, problem, inputs))
    except AssertionError as error:
        return "budget" in str(error)
    except Exception as error:  # the interpreter wraps what is raised inside it
        if "OutOfBoundsError" in str(error):
            return True
        raise
    return False

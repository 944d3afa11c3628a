"""Bugs planted in the kernels and in the plan themselves, one at a time: the judge catches each.

In Triton's interpreter, on a handful of small problems that pass without a bug. The bugs are those that
shipped in such kernels, as far as they concern a kernel or its work table.
"""

from collections.abc import Iterator

import pytest
import torch

import hydragen
from hydragen import api
from hydragen.testing import Inputs, Problem, assert_within_budget, planted, run
from hydragen.testing.adapters.ours import triton
from hydragen.testing.bounds import checked_accesses

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
    "odd heads": Problem(
        (-1, 0), (20, 9), (1,), (2,), 6, 2, 13, 7, softcap=2.0, sinks=True, sharpness="peaked"
    ),
    "several roots": Problem((-1, -1, 0, 1), (19, 33, 4, 3), (3, 2, 3), (1, 1, 1), **SMALL),
    "one partial": Problem((-1, -1), (21, 5), (0, 1), (1, 2), **SMALL, sinks=True),
}

ATTEND, BLOCK, MERGE, PRIMITIVES, PLAN = (
    "hydragen.kernels.attend",
    "hydragen.kernels.block",
    "hydragen.kernels.merge",
    "hydragen.kernels.primitives",
    "hydragen.work",
)
QUERIES = "hydragen.queries"
BUGS = {
    "causal mask off by one": (BLOCK, "visible & (distance >= 0)", "visible & (distance > 0)"),
    "window of one key more": (BLOCK, "distance < window", "distance <= window"),
    "tail not masked": (
        BLOCK,
        "        visible = in_range[None, :]\n",
        "        visible = (in_range == in_range)[None, :]\n",
    ),
    "padding of head_dim read": (
        BLOCK,
        "d_ok = tl.arange(0, BLOCK_D) < HEAD_DIM",
        "d_ok = tl.arange(0, BLOCK_D) >= 0",
    ),
    "head_dim_v stored without a column mask": (
        ATTEND,
        "part_mask = (local < num_tok)[:, None] & (offs_dv < HEAD_DIM_V)[None, :]",
        "part_mask = (local < num_tok)[:, None] & (offs_dv >= 0)[None, :]",
    ),
    "running sum not rescaled": (
        BLOCK,
        "running_sum = running_sum * alpha + tl.sum(p, 1)",
        "running_sum = running_sum + tl.sum(p, 1)",
    ),
    "lse in base 2": (ATTEND, "tl.store(lse_ptr + out_rows, lse * LN_2", "tl.store(lse_ptr + out_rows, lse"),
    "GQA heads interleaved": (
        ATTEND,
        "head = kv_head * GROUP_SIZE + rows % (HEADS * GROUP_SIZE)",
        "head = kv_head + rows % (HEADS * GROUP_SIZE) * num_kv_heads",
    ),
    "slot of a node ignored": (
        ATTEND,
        "k_head_ptr += slot.to(tl.int64) * stride_kn",
        "k_head_ptr += (slot * 0).to(tl.int64) * stride_kn",
    ),
    "fully visible block includes a hidden key": (
        ATTEND,
        "tl.minimum(end, first_pos + 1 - kv_start)",
        "tl.minimum(end, last_pos + 1 - kv_start)",
    ),
    "finite stand-in for minus infinity": (
        PRIMITIVES,
        "LOWEST = tl.constexpr(-3.4028234663852886e38)",
        "LOWEST = tl.constexpr(-5.0e4)",
    ),
    "empty state has a finite lse": (
        PRIMITIVES,
        'tl.where(empty, float("-inf"), running_max',
        "tl.where(empty, LOWEST, running_max",
    ),
    "minus infinity minus minus infinity": (
        PRIMITIVES,
        "new_max = tl.maximum(running_max, part_lse)",
        "new_max = tl.maximum(tl.where(running_sum == 0.0, part_lse, running_max), part_lse)",
    ),
    "sink weighs in the wrong base": (PRIMITIVES, "sink_log2 = sink * LOG2_E", "sink_log2 = sink * 1.0"),
    "tanh loses its sign": (PRIMITIVES, "tl.where(x < 0, -large, large)", "large"),
    "sink counted twice": (
        MERGE,
        "= fold_sink(acc, running_max, running_sum, sink)",
        "= fold_sink(*fold_sink(acc, running_max, running_sum, sink), sink)",
    ),
    "last partial left out": (MERGE, "ok = block + i < last", "ok = block + i < last - 1"),
    "merge in natural base": (
        MERGE,
        "tl.store(lse_ptr + row, lse * LN_2",
        "tl.store(lse_ptr + row, lse * LN_2 * LN_2",
    ),
    "one prefix too many": (
        QUERIES,
        "first[tree.row_begin], first[tree.row_end]",
        "first[tree.row_begin * 0], first[tree.row_end]",
    ),
    "last key of a split dropped": (PLAN, "segments.kv_len[split_of])", "segments.kv_len[split_of] - 1)"),
    "partials of two splits share a place": (
        PLAN,
        '"dest": partials_before[source]',
        '"dest": partials_before[source] * 0',
    ),
    "rows in tree order": (QUERIES, "token = q_starts[row] + within", "token = np.arange(first[-1])"),
    "second block of rows is the first": (
        PLAN,
        '"row_begin": block * tile.block_m',
        '"row_begin": block * 0',
    ),
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
    module, old, new = BUGS[bug]
    with planted(module, old, new):
        assert any(caught(problem) for problem in PROBLEMS.values())


def caught(problem: Problem) -> bool:
    try:
        assert_within_budget(problem, *run(implementation, problem))
    except AssertionError as error:
        return "budget" in str(error)
    except Exception as error:  # the interpreter wraps what is raised inside it
        if "OutOfBoundsError" in str(error):
            return True
        raise
    return False

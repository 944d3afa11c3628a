"""Laws of where tensors lie: with any strides, in one place, in pages. Part of `hydragen.testing.laws`."""

from __future__ import annotations

from dataclasses import replace

from hydragen.testing.judge import Implementation, assert_within_budget, run
from hydragen.testing.pages import Pool, in_pages
from hydragen.testing.problem import Problem
from hydragen.testing.tally import told
from hydragen.testing.unchanged import expect_unchanged
from hydragen.testing.views import Memory


@told
def strides_change_nothing(
    implementation: Implementation,
    problem: Problem,
    memory: Memory,
    v_memory: Memory | None = None,
    k_memory: Memory | None = None,
) -> None:
    """Tensors may lie in memory in any way, and values and keys in another way than queries."""
    __tracebackhide__ = True
    v_memory, k_memory = v_memory or memory, k_memory or memory
    inputs = problem.tensors()
    k, v = inputs.with_memory(k_memory).k, inputs.with_memory(v_memory).v
    case = (problem, replace(inputs.with_memory(memory), k=k, v=v))
    law = f"{memory} queries with {k_memory} keys and {v_memory} values change nothing"
    expect_unchanged(implementation, problem, case, law)


@told
def equal_heads_may_lie_in_one_place(implementation: Implementation, problem: Problem) -> None:
    """Keys and values that are the same for all heads may be one head expanded: a stride of 0."""
    __tracebackhide__ = True
    inputs = problem.tensors()
    k, v = (x[:, :1].expand_as(x) for x in (inputs.k, inputs.v))
    one = replace(inputs, k=k, v=v)
    out, lse = run(implementation, problem, one)
    assert_within_budget(problem, out, lse, inputs=one, law="one head of keys and values, expanded")


@told
def paging_changes_nothing(
    implementation: Implementation,
    problem: Problem,
    page_size: int,
    seed: int = 0,
    pool: Pool = "apart",
    memory: Memory = "contiguous",
) -> None:
    """Pages of any size in any order may hold keys and values; for who reads ``inputs.pages``.

    Twice, with other pages the second time: who plans once for a structure must read the new table. `pool` is
    how the pool lies in memory (`hydragen.testing.pages`), `memory` how queries do.
    """
    __tracebackhide__ = True
    inputs = problem.tensors()
    inputs = replace(inputs, q=inputs.with_memory(memory).q)
    for order in (seed, seed + 1):
        case = (problem, in_pages(problem, inputs, page_size, order, pool))
        law = f"pages of {page_size} tokens ({pool}, {memory} queries) change nothing"
        expect_unchanged(implementation, problem, case, law)

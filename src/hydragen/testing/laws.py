"""Laws that every exact attention obeys, as functions of an implementation and a problem.

Each law but the last three changes the problem in a way that must not change the result, runs the
implementation on the changed problem, and compares with the oracle on the *unchanged* one: fast paths are
never compared with one another alone. A law asserts and returns None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hydragen.testing import transforms
from hydragen.testing.budget import errors
from hydragen.testing.judge import Implementation, assert_within_budget, budget, oracle, run
from hydragen.testing.memory_laws import (
    equal_heads_may_lie_in_one_place,
    paging_changes_nothing,
    strides_change_nothing,
)
from hydragen.testing.problem import Problem
from hydragen.testing.tally import saw_result, told
from hydragen.testing.unchanged import expect_unchanged

__all__ = [
    "companion",
    "copies_change_nothing",
    "cutting_changes_nothing",
    "empty_segments_change_nothing",
    "equal_heads_may_lie_in_one_place",
    "flattening_changes_nothing",
    "matches_oracle",
    "out_is_linear_in_v",
    "paging_changes_nothing",
    "permuting_rows_permutes_results",
    "runs_give_the_same_bits",
    "shifting_keys_shifts_lse",
    "strides_change_nothing",
    "unrelated_rows_change_no_bits",
    "unrelated_rows_change_nothing",
    "unsharing_changes_nothing",
]


@told
def matches_oracle(implementation: Implementation, problem: Problem) -> None:
    """``out``, and ``lse`` where the implementation returns it, are within the error budget."""
    __tracebackhide__ = True
    assert_within_budget(problem, *run(implementation, problem))


@told
def cutting_changes_nothing(implementation: Implementation, problem: Problem, node: int, at: int) -> None:
    """A segment may be cut in two anywhere, at its ends as well."""
    __tracebackhide__ = True
    case = transforms.cut(problem, problem.tensors(), node, at)
    expect_unchanged(implementation, problem, case, f"node {node} cut after {at} tokens changes nothing")


@told
def empty_segments_change_nothing(implementation: Implementation, problem: Problem, node: int) -> None:
    """An empty segment below any node, or above all of them, changes nothing."""
    __tracebackhide__ = True
    inputs = problem.tensors()
    below = transforms.splice_empty(problem, inputs, node)
    expect_unchanged(implementation, problem, below, f"an empty segment under node {node} changes nothing")
    above = transforms.add_empty_root(problem, inputs)
    expect_unchanged(implementation, problem, above, "an empty segment above all nodes changes nothing")


@told
def unsharing_changes_nothing(implementation: Implementation, problem: Problem, node: int) -> None:
    """Copying a segment into everything below it changes nothing."""
    __tracebackhide__ = True
    case = transforms.unshare(problem, problem.tensors(), node)
    expect_unchanged(
        implementation, problem, case, f"node {node} copied into everything below changes nothing"
    )


@told
def flattening_changes_nothing(implementation: Implementation, problem: Problem) -> None:
    """A tree gives the same as its rows without any sharing."""
    __tracebackhide__ = True
    case = transforms.flatten(problem, problem.tensors())
    expect_unchanged(implementation, problem, case, "the tree equals its flattening")


@told
def permuting_rows_permutes_results(
    implementation: Implementation, problem: Problem, order: Sequence[int], *, nodes_along: bool = False
) -> None:
    """Row ``order[i]`` moved to place i takes its result there.

    With `nodes_along` it takes its segment along, for who knows no other order of these.
    """
    __tracebackhide__ = True
    case = transforms.permute_rows(problem, problem.tensors(), order, nodes_along=nodes_along)
    places = torch.argsort(transforms.query_tokens(problem, order))
    expect_unchanged(
        implementation, problem, case, f"rows in the order {tuple(order)} give results in that order", places
    )


@told
def unrelated_rows_change_nothing(
    implementation: Implementation, problem: Problem, other: Problem, *, poison: bool = True
) -> None:
    """Other sequences in the batch change nothing; ``other`` lends them its tree, lengths and seed.

    With `poison` segments of theirs that no row attends to hold NaN, and so does one that nobody attends to
    behind all others: what is read beyond the last key of a row is not always harmless.
    """
    __tracebackhide__ = True
    other = companion(problem, other)
    theirs = other.tensors()
    if poison:
        theirs = transforms.poison_unattended(other, theirs)
    case = transforms.add_unrelated(problem, problem.tensors(), other, theirs)
    if poison:
        case = transforms.append_poison(*case)
    mine = slice(other.total_q, None)
    expect_unchanged(implementation, problem, case, f"unrelated rows change nothing: {other!r}", mine)


@told
def copies_change_nothing(
    implementation: Implementation, problem: Problem, copies: int, *, shared: bool
) -> None:
    """Copies of all rows, below the same segments or each with a tree of its own, give copies of the results.

    For batches much larger than those that are drawn.
    """
    __tracebackhide__ = True
    case = transforms.repeat(problem, problem.tensors(), copies, shared=shared)
    out, lse = run(implementation, *case)
    expected = oracle(problem)
    law = f"{copies} copies of all rows {'of one tree' if shared else 'and of the tree'} give the same"
    assert_within_budget(
        problem,
        _worst_copy("out", out, expected.out, copies),
        None if lse is None else _worst_copy("lse", lse, expected.lse, copies),
        law=f"{law}\n  changed   {case[0]!r}",
    )


def _worst_copy(name: str, got: Tensor, expected: Tensor, copies: int) -> Tensor:
    """Of each element the copy that is furthest from what is expected."""
    __tracebackhide__ = True
    shape = (copies * len(expected), *expected.shape[1:])
    if got.shape != shape:
        raise AssertionError(
            f"{name}.shape is {tuple(got.shape)}, but should be {shape} for {copies} copies of all rows"
        )
    each = got.unflatten(0, (copies, len(expected)))
    worst = errors(each, expected.expand_as(each)).argmax(0, keepdim=True)
    furthest: Tensor = each.gather(0, worst).squeeze(0)
    return furthest


def companion(problem: Problem, other: Problem) -> Problem:
    """``other``'s tree, lengths and values with everything else as in ``problem``."""
    changed = replace(
        problem,
        parents=other.parents,
        kv_lens=other.kv_lens,
        row_to_node=other.row_to_node,
        q_lens=other.q_lens,
        seed=other.seed,
    )
    capped = problem.softcap is not None or problem.scale == 0
    return changed if capped else replace(changed, sharpness=other.sharpness)


@told
def shifting_keys_shifts_lse(implementation: Implementation, problem: Problem, seed: int = 0) -> None:
    """A constant vector added to every key leaves ``out`` as it is and moves ``lse`` as it moves the logits.

    Keys and vector lie on a grid, so that their sum is exact in every dtype. Needs a problem without softcap
    and sinks, which are not shifted along.
    """
    __tracebackhide__ = True
    if problem.softcap is not None or problem.sinks:
        raise ValueError(f"problem must have neither softcap nor sinks: {problem!r}")
    inputs = problem.tensors()
    before = replace(inputs, k=transforms.on_grid(inputs.k))
    generator = torch.Generator().manual_seed(seed)
    shape = (problem.num_kv_heads, problem.head_dim)
    constant = transforms.on_grid(torch.randn(shape, generator=generator) * 2).to(problem.dtype)
    after = replace(before, k=before.k + constant)
    expected = oracle(problem, before)
    shifted_lse = expected.lse + transforms.shift_of_logits(problem, inputs, constant)
    out, lse = run(implementation, problem, after)
    law = "a constant added to all keys changes nothing but lse"
    assert_within_budget(problem, out, lse, inputs=after, expected=(expected.out, shifted_lse), law=law)


@told
def out_is_linear_in_v(implementation: Implementation, problem: Problem) -> None:
    """``out`` for values 2a - b is twice ``out`` for a, less ``out`` for b; and values may be huge or tiny.

    For values a times a power of two ``out`` is that for a times this power: large enough to overflow another
    half type than the problem's.
    """
    __tracebackhide__ = True
    inputs = problem.tensors()
    a = transforms.on_grid(inputs.v)
    b = a.roll(1, 0).flip(-1)
    parts = [(2.0, replace(inputs, v=a)), (-1.0, replace(inputs, v=b))]
    combined = replace(inputs, v=2 * a - b)
    law = "out is linear in v"
    out, lse = run(implementation, problem, combined)
    # Combine what the implementation says of a and b: a law of its results, not only of the oracle's.
    total = torch.zeros(out.shape, dtype=torch.float64)
    for factor, part in parts:
        part_out, part_lse = run(implementation, problem, part)
        assert_within_budget(problem, part_out, part_lse, inputs=part, law=law)
        total += factor * part_out.double()
    assert_within_budget(problem, out, lse, inputs=combined, law=law)
    for exponent in transforms.MAGNITUDES[problem.dtype]:
        scaled = replace(inputs, v=a * 2.0**exponent)
        scaled_law = f"values 2**{exponent} times as large give such results"
        assert_within_budget(problem, *run(implementation, problem, scaled), inputs=scaled, law=scaled_law)
    of_rows = zip(budget(problem, combined), *(budget(problem, part) for _, part in parts), strict=True)
    allowed = [whole.out + 2 * of_a.out + of_b.out for whole, of_a, of_b in of_rows]
    per_row = zip(errors(out, total).split(list(problem.q_lens)), allowed, strict=True)
    for row, (error, limit) in enumerate(per_row):
        if bool((error > limit).any()):
            raise AssertionError(
                f"{law}, but row {row} is off by {float(error.max()):.3g}, with at most {limit:.3g} allowed\n"
                f"  {problem!r}"
            )


@told
def runs_give_the_same_bits(implementation: Implementation, problem: Problem) -> None:
    """Two runs on the same tensors give the same bits."""
    __tracebackhide__ = True
    inputs = problem.tensors()
    first, second = run(implementation, problem, inputs), run(implementation, problem, inputs)
    saw_result(problem, {}, "")
    for name, one, other in zip(("out", "lse"), first, second, strict=True):
        _assert_same_bits(name, one, other, f"two runs give the same bits\n  {problem!r}")


@told
def unrelated_rows_change_no_bits(implementation: Implementation, problem: Problem, other: Problem) -> None:
    """Unrelated sequences do not change a bit: for implementations that promise batch invariance."""
    __tracebackhide__ = True
    inputs, other = problem.tensors(), companion(problem, other)
    case = transforms.add_unrelated(problem, inputs, other, other.tensors())
    alone, together = run(implementation, problem, inputs), run(implementation, *case)
    for name, one, both in zip(("out", "lse"), alone, together, strict=True):
        mine = None if both is None else both[other.total_q :]
        _assert_same_bits(name, one, mine, f"unrelated rows change no bits: {other!r}\n  {problem!r}")


def _assert_same_bits(name: str, one: Tensor | None, other: Tensor | None, law: str) -> None:
    __tracebackhide__ = True
    if one is None or other is None:
        return
    differing = ~((one == other) | (one.isnan() & other.isnan()))
    if bool(differing.any()):
        raise AssertionError(f"{name} differs in {int(differing.sum())} of {one.numel()} values, but {law}")

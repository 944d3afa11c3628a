"""Verdicts: is an implementation's result within the error budget of the oracle?

An implementation is a function ``(problem, inputs) -> out`` or ``(problem, inputs) -> (out, lse)``:

>>> def my_kernel_under_test(problem, inputs):  # doctest: +SKIP
...     return my_attention(inputs.q, inputs.k, inputs.v, problem.parents, scale=problem.logit_scale)
>>> @given(problems(causal=False))  # doctest: +SKIP
... def test_my_kernel(problem):
...     assert_within_budget(problem, *run(my_kernel_under_test, problem))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from hydragen.testing.budget import Oracle, RowBudget, compute_budgets, compute_oracle, errors
from hydragen.testing.inputs import Inputs, whole_memory
from hydragen.testing.problem import Problem
from hydragen.testing.tally import saw_result, saw_run

Implementation: TypeAlias = Callable[[Problem, Inputs], Tensor | tuple[Tensor, Tensor | None]]
"""``out`` [total_q, num_q_heads, head_dim_v] and, if it has one, ``lse`` [total_q, num_q_heads]."""


def run(
    implementation: Implementation, problem: Problem, inputs: Inputs | None = None
) -> tuple[Tensor, Tensor | None]:
    """Run an implementation on CPU tensors of a problem, and see that it leaves them as they were.

    Returns
    -------
    out, lse
        Copies, on the CPU, of what the implementation returned, which may use its memory again; ``lse`` is
        None if there is none.

    Raises
    ------
    TypeError
        If the result is neither a tensor nor a pair of tensors.
    AssertionError
        If an input was modified.
    """
    __tracebackhide__ = True
    out, lse = run_in_place(implementation, problem, problem.tensors() if inputs is None else inputs)
    return _copied(out), None if lse is None else _copied(lse)


def _copied(result: Tensor) -> Tensor:
    return result.detach().to("cpu", copy=True)


def run_in_place(
    implementation: Implementation, problem: Problem, inputs: Inputs
) -> tuple[Tensor, Tensor | None]:
    """As `run`, with tensors and results on the device where they are."""
    __tracebackhide__ = True
    lent = inputs.clone()
    saw_run(problem)
    result = implementation(problem, lent)
    assert_unmodified(problem, inputs, lent)
    out, lse = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    for name, value in (("out", out), ("lse", lse)):
        if not isinstance(value, Tensor) and not (name == "lse" and value is None):
            raise TypeError(
                "an implementation must return out or (out, lse) as tensors, "
                f"got {type(value).__name__} for {name}"
            )
        if isinstance(value, Tensor) and type(value) not in (Tensor, torch.nn.Parameter):
            # what it says of itself is not for the judge to believe
            raise TypeError(
                f"an implementation must return plain tensors, got {type(value).__name__} for {name}; "
                "call .as_subclass(torch.Tensor)"
            )
        if isinstance(value, Tensor) and (value.is_meta or value.layout != torch.strided):
            what = "no data (meta)" if value.is_meta else f"the layout {value.layout}"
            raise TypeError(f"an implementation must return dense tensors, got {what} for {name}")
    return out, lse


def assert_unmodified(problem: Problem, given: Inputs, lent: Inputs) -> None:
    """Assert that an implementation left the tensors that it was lent as they were given."""
    __tracebackhide__ = True
    for name, before, after in _tensors(given, lent):
        if not same_bits(before, after):
            raise AssertionError(f"{name} was modified by the implementation\n{_about(problem)}")
    for name, before, after in _tensors(given.clone(), lent):  # a clone has the same memory, NaN in the gaps
        if not after.is_contiguous() or after.storage_offset():
            around = whole_memory(before)
            if not same_bits(around, whole_memory(after)[: around.numel()]):
                between = f"memory between the elements of {name} was modified by the implementation"
                raise AssertionError(f"{between}\n{_about(problem)}")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same numbers, NaN in the same places included."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.shape == other.shape and torch.equal(one.view(bits), other.view(bits))


def _tensors(given: Inputs, lent: Inputs) -> Iterator[tuple[str, Tensor, Tensor]]:
    yield from (("q", given.q, lent.q), ("k", given.k, lent.k), ("v", given.v, lent.v))
    yield "cu_seqlens_q", given.cu_seqlens_q, lent.cu_seqlens_q
    yield "cu_seqlens_k", given.cu_seqlens_k, lent.cu_seqlens_k
    if given.sinks is not None and lent.sinks is not None:
        yield "sinks", given.sinks, lent.sinks
    if given.pages is not None and lent.pages is not None:
        yield "k_cache", given.pages.k_cache, lent.pages.k_cache
        yield "v_cache", given.pages.v_cache, lent.pages.v_cache
        yield "page_indptr", given.pages.page_indptr, lent.pages.page_indptr
        yield "page_indices", given.pages.page_indices, lent.pages.page_indices


def oracle(problem: Problem, inputs: Inputs | None = None) -> Oracle:
    """The oracle's ``out`` and ``lse`` for a problem's tensors, or for others of the same shapes."""
    return _judge(problem, inputs)[0]


def budget(problem: Problem, inputs: Inputs | None = None) -> list[RowBudget]:
    """The error budget of each row."""
    return _judge(problem, inputs)[1]


@lru_cache(maxsize=16)
def _judge(problem: Problem, inputs: Inputs | None) -> tuple[Oracle, list[RowBudget]]:
    # Inputs compare by identity, and the cache keeps them alive: others cannot be mistaken for them.
    given = (problem.tensors() if inputs is None else inputs).to("cpu")
    expected = compute_oracle(problem, given)
    return expected, compute_budgets(problem, given, expected)


def assert_within_budget(
    problem: Problem,
    out: Tensor,
    lse: Tensor | None = None,
    *,
    inputs: Inputs | None = None,
    expected: tuple[Tensor, Tensor] | None = None,
    law: str = "matches the oracle",
) -> None:
    """Assert that a result is as close to the oracle as its budget demands.

    Checks dtype, then shape, then values. Equal infinities are required; NaN passes only where the oracle has
    NaN.

    Parameters
    ----------
    problem
        What was computed.
    out
        ``[total_q, num_q_heads, head_dim_v]`` in the problem's dtype.
    lse
        ``[total_q, num_q_heads]``, float32 (float64 for float64), natural log; None to leave it unjudged.
    inputs
        The tensors it was computed from, if not ``problem.tensors()``.
    expected
        ``(out, lse)`` in float64 to compare with in place of the oracle's result; the budget stays the
        problem's.
    law
        What should hold, for the message.

    Raises
    ------
    AssertionError
        If the result is outside of the budget; says where, by how much, and for which problem.
    """
    __tracebackhide__ = True
    judged, budgets = _judge(problem, inputs)
    expected_out, expected_lse = (judged.out, judged.lse) if expected is None else expected
    about = _about(problem, law, own_tensors=inputs is not None)
    state_dtype = torch.float64 if problem.dtype == torch.float64 else torch.float32
    _assert_like("out", out, problem.dtype, expected_out.shape, about)
    if lse is not None:
        _assert_like("lse", lse, state_dtype, expected_lse.shape, about)
    verdicts = {"out": _compare("out", problem, out.detach().cpu(), expected_out, budgets)}
    if lse is not None:
        verdicts["lse"] = _compare("lse", problem, lse.detach().cpu(), expected_lse, budgets)
    failures = [failure for _, failure in verdicts.values() if failure]
    ratios = {name: ratio for name, (ratio, _) in verdicts.items()}
    saw_result(problem, ratios, failures[0].partition("\n")[0] if failures else "")
    if failures:
        raise AssertionError(f"{failures[0]}\n{about}")


def _assert_like(name: str, got: Tensor, dtype: torch.dtype, shape: torch.Size, about: str) -> None:
    __tracebackhide__ = True
    if got.dtype != dtype:
        raise AssertionError(f"{name}.dtype is {got.dtype}, but should be {dtype}\n{about}")
    if got.shape != shape:
        raise AssertionError(f"{name}.shape is {tuple(got.shape)}, but should be {tuple(shape)}\n{about}")


def _compare(
    name: str, problem: Problem, got: Tensor, expected: Tensor, budgets: list[RowBudget]
) -> tuple[float, str]:
    """Largest error as a multiple of its budget, and what to say if that is more than 1."""
    row_of_token = torch.repeat_interleave(torch.arange(problem.num_rows), torch.tensor(problem.q_lens))
    allowed_in_row = torch.tensor([getattr(row, name) for row in budgets], dtype=torch.float64)
    allowed = allowed_in_row[row_of_token].reshape(-1, *[1] * (got.dim() - 1)).expand(got.shape)
    error = errors(got, expected)
    # a budget of 0 (nothing to attend to) is kept by an error of 0
    ratio = torch.where(error <= allowed, (error / allowed).nan_to_num(nan=0.0), error / allowed)
    worst = int(ratio.argmax())
    largest_ratio = float(ratio.flatten()[worst])
    outside = ~(error <= allowed)
    if not bool(outside.any()):
        return largest_ratio, ""
    token, head, *dim = (int(index) for index in torch.unravel_index(torch.tensor(worst), got.shape))
    row = int(row_of_token[token])
    query = token - sum(problem.q_lens[:row])
    where = f"row {row}, query {query}, head {head}" + (f", dim {dim[0]}" if dim else "")
    place = (token, head, *dim)
    return largest_ratio, (
        f"{name} is outside of the error budget at {where}\n"
        f"  got       {float(got[place]):.9g}\n"
        f"  expected  {float(expected[place]):.9g}\n"
        f"  error     {float(error[place]):.3g} = {largest_ratio:.3g} x the budget\n"
        f"  budget    {float(allowed[place]):.3g} = {budgets[row].explain(name)}\n"
        f"  extent    {int(outside.sum())} of {outside.numel()} values outside"
    )


def _about(problem: Problem, law: str = "", *, own_tensors: bool = False) -> str:
    lines = [f"  law       {law}"] if law else []
    lines.append(f"  problem   {problem!r}")
    if own_tensors:
        lines.append("            with other tensors than problem.tensors()")
    lines.append(f"            {problem}")
    return "\n".join(lines)

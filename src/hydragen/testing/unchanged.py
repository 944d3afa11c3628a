"""What most laws say: a changed problem has the result of the unchanged one."""

from __future__ import annotations

from torch import Tensor

from hydragen.testing.judge import Implementation, assert_within_budget, run
from hydragen.testing.problem import Problem
from hydragen.testing.transforms import Case


def expect_unchanged(
    implementation: Implementation,
    problem: Problem,
    case: Case,
    law: str,
    places: Tensor | slice | None = None,
) -> None:
    """Compare a changed problem's result, at the old queries' ``places``, with the unchanged one's oracle."""
    __tracebackhide__ = True
    out, lse = run(implementation, *case)
    if places is not None:
        out, lse = out[places], None if lse is None else lse[places]
    assert_within_budget(problem, out, lse, law=f"{law}\n  changed   {case[0]!r}")

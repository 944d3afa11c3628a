"""A gate for attention over trees of segments: problems, an oracle, an error budget, and laws.

Ten lines put somebody else's kernel under it (needs Hypothesis: the extra ``test``)::

    from hypothesis import given, settings
    from hydragen.testing import assert_within_budget, problems, run

    def my_kernel_under_test(problem, inputs):
        return my_kernel(inputs.q, inputs.k, inputs.v, problem.parents, problem.row_to_node)

    @settings(deadline=None)
    @given(problems(causal=False, window=False, softcap=False, scale=False, sinks=False))
    def test_my_kernel(problem):
        assert_within_budget(problem, *run(my_kernel_under_test, problem))

Without any code: ``pytest --pyargs hydragen.testing.conformance --implementation my_module:my_function``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hydragen.testing.budget import Oracle, RowBudget
from hydragen.testing.inputs import Inputs
from hydragen.testing.judge import Implementation, assert_within_budget, budget, oracle, run
from hydragen.testing.plant import plant, planted
from hydragen.testing.problem import Problem
from hydragen.testing.shrink import shrink
from hydragen.testing.views import View, restride, view

if TYPE_CHECKING:
    from hydragen.testing.strategies import problems

__all__ = [
    "Problem",
    "Inputs",
    "View",
    "view",
    "restride",
    "problems",
    "Implementation",
    "run",
    "Oracle",
    "oracle",
    "RowBudget",
    "budget",
    "assert_within_budget",
    "shrink",
    "plant",
    "planted",
]


def __getattr__(name: str) -> Any:
    # Problems, oracle and budget work without Hypothesis: benchmarks use them.
    if name != "problems":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from hydragen.testing.strategies import problems  # noqa: PLC0415 - optional
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise ModuleNotFoundError(
            "hydragen.testing.problems needs Hypothesis: pip install '.[test]' in hydragen's checkout",
            name="hypothesis",
        ) from error
    return problems

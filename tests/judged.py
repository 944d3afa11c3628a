"""`hydragen.attention` on a problem of `hydragen.testing`, judged by its oracle and error budget."""

from typing import Any

import torch
from torch import Tensor

from hydragen.testing import Inputs, Problem, assert_within_budget, view
from hydragen.testing.adapters import ours


def attend(
    problem: Problem,
    backend: str,
    device: torch.device,
    inputs: Inputs | None = None,
    *,
    layout: str = "packed",
    spare: int = 0,
    memory: str | None = None,
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Return `out` and `lse` as [total_q, ...]; `arguments` replace what the problem says."""
    given = (problem.tensors() if inputs is None else inputs).to(device)
    seen = view(problem, given, layout, spare=spare, memory=memory)
    return ours.attend(problem, given, seen, backend=backend, **arguments)


def check(
    problem: Problem, backend: str, device: torch.device, inputs: Inputs | None = None, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """Return what `attend` returns if it is within the error budget of the problem."""
    __tracebackhide__ = True
    out, lse = attend(problem, backend, device, inputs, **arguments)
    assert_within_budget(problem, out, lse, inputs=inputs)
    return out, lse

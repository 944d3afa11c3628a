"""`hydragen.attention` on a problem of `hydragen.testing`, judged by its oracle and error budget."""

from typing import Any

import torch
from torch import Tensor

import hydragen
from hydragen.testing import Inputs, Problem, assert_within_budget, view


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
    call = {
        "tree": seen.tree,
        "kv_lens": seen.kv_lens,
        "cu_seqlens_q": seen.cu_seqlens_q,
        "scale": problem.scale,
        "causal": problem.causal,
        "window": problem.window,
        "softcap": problem.softcap,
        "sinks": given.sinks,
        "return_lse": True,
        "backend": backend,
    }
    state = hydragen.attention(seen.q, seen.kv, **{**call, **arguments})
    return seen.packed(state.out), seen.packed(state.lse)


def check(
    problem: Problem, backend: str, device: torch.device, inputs: Inputs | None = None, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """Return what `attend` returns if it is within the error budget of the problem."""
    __tracebackhide__ = True
    out, lse = attend(problem, backend, device, inputs, **arguments)
    assert_within_budget(problem, out, lse, inputs=inputs)
    return out, lse

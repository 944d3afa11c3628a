"""hydragen.attention itself: ``--implementation hydragen.testing.adapters.ours:attention``.

Keys and values packed, on the device and backend that ``backend="auto"`` chooses: `reference` and
`triton` name one.
"""

from __future__ import annotations

from typing import Any

import torch

import hydragen
from hydragen.testing.inputs import Inputs
from hydragen.testing.problem import Problem
from hydragen.testing.views import View


def attend(
    problem: Problem, inputs: Inputs, view: View | None = None, *, backend: str = "auto", **options: Any
) -> hydragen.AttentionState:
    """``hydragen.attention`` on a view of a problem, by default the packed one.

    Parameters
    ----------
    options
        Arguments of ``hydragen.attention`` that replace what the problem says.

    Returns
    -------
    AttentionState
        ``out`` and ``lse`` as ``[total_q, ...]``.
    """
    given = problem.as_packed(inputs) if view is None else view
    arguments = {
        "tree": given.tree,
        "kv_lens": given.kv_lens,
        "cu_seqlens_q": given.cu_seqlens_q,
        "backend": backend,
        **problem.options(inputs),
    }
    state = hydragen.attention(given.q, given.kv, **{**arguments, **options}, return_lse=True)
    if not isinstance(state, hydragen.AttentionState):
        raise TypeError(f"return_lse=True must give an AttentionState, got {type(state).__name__}")
    return hydragen.AttentionState(given.packed(state.out), given.packed(state.lse))


def attention(problem: Problem, inputs: Inputs) -> hydragen.AttentionState:
    """The backend that hydragen chooses by itself."""
    return attend(problem, inputs)


def reference(problem: Problem, inputs: Inputs) -> hydragen.AttentionState:
    """The reference backend."""
    return attend(problem, inputs, backend="reference")


def triton(problem: Problem, inputs: Inputs) -> hydragen.AttentionState:
    """The Triton backend: needs a GPU, or TRITON_INTERPRET=1."""
    return attend(problem, inputs, backend="triton")


for _function in (attention, triton):
    _function.capabilities = {"device": "cuda" if torch.cuda.is_available() else "cpu"}  # type: ignore[attr-defined]

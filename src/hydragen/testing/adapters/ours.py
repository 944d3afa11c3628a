"""hydragen.attention itself: ``--implementation hydragen.testing.adapters.ours:attention``.

Keys and values packed or paged, on the device and backend that ``backend="auto"`` chooses: `reference` and
`triton` name one.
"""

from __future__ import annotations

from typing import Any

import torch

import hydragen
from hydragen.testing.inputs import Inputs
from hydragen.testing.problem import Problem
from hydragen.testing.views import View, paged_view


def attend(
    problem: Problem, inputs: Inputs, view: View | None = None, *, backend: str = "auto", **options: Any
) -> hydragen.AttentionState:
    """``hydragen.attention`` on a view of a problem, by default packed or, if the inputs are, paged.

    Parameters
    ----------
    options
        Arguments of ``hydragen.attention`` that replace what the problem says.

    Returns
    -------
    AttentionState
        ``out`` and ``lse`` as ``[total_q, ...]``.
    """
    if view is None:
        view = paged_view(problem, inputs) if inputs.pages else problem.as_packed(inputs)
    arguments = {
        "tree": view.tree,
        "kv_lens": view.kv_lens,
        "cu_seqlens_q": view.cu_seqlens_q,
        "backend": backend,
        **problem.options(inputs),
    }
    state = hydragen.attention(view.q, view.kv, **{**arguments, **options}, return_lse=True)
    if not isinstance(state, hydragen.AttentionState):
        raise TypeError(f"return_lse=True must give an AttentionState, got {type(state).__name__}")
    return hydragen.AttentionState(view.packed(state.out), view.packed(state.lse))


def attention(problem: Problem, inputs: Inputs) -> hydragen.AttentionState:
    """The backend that hydragen chooses by itself."""
    return attend(problem, inputs)


def reference(problem: Problem, inputs: Inputs) -> hydragen.AttentionState:
    """The reference backend."""
    return attend(problem, inputs, backend="reference")


def triton(problem: Problem, inputs: Inputs) -> hydragen.AttentionState:
    """The Triton backend: needs a GPU, or TRITON_INTERPRET=1."""
    return attend(problem, inputs, backend="triton")


_device = "cuda" if torch.cuda.is_available() else "cpu"
for _function, _on in ((attention, _device), (reference, "cpu"), (triton, _device)):
    _function.capabilities = {"paged": True, "lse": True, "device": _on}  # type: ignore[attr-defined]  # a function

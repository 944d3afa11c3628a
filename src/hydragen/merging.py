"""merge_states: the algebra that makes attention over pieces exact."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from hydragen.types import AttentionState
from hydragen.validation.tensors import check_real
from hydragen_reference import decomposed
from hydragen_reference.segment import in_transform


def merge_states(states: Sequence[AttentionState | tuple[Tensor, Tensor]]) -> AttentionState:
    """Merge attention over disjoint sets of keys into attention over all of them.

    Associative and commutative up to rounding; `(0, -inf)` is the identity; empty states alone give the empty
    state. Gradients flow through `out` and `lse`. On a GPU one kernel does it, for up to 16 states where no
    gradients are needed and nothing is float64. Hydragen (arXiv 2402.05099), section 3.1.

    Parameters
    ----------
    states : sequence of AttentionState, or of pairs (out, lse)
        `out` [..., num_heads, head_dim_v], any floating dtype; `lse` [..., num_heads], natural log, float32
        or float64. All of the same shapes, `out` of one dtype, on one device. Sinks belong to one state only.

    Returns
    -------
    AttentionState
        `out` in the dtype of the inputs, `lse` in theirs. The sums are computed in float32 or better.

    Raises
    ------
    TypeError, ValueError
        If there is no state, or the states do not fit together.

    Examples
    --------
    >>> import torch
    >>> a = AttentionState(torch.ones(1, 2, 4), torch.zeros(1, 2))
    >>> nothing = AttentionState(torch.zeros(1, 2, 4), torch.full((1, 2), -torch.inf))
    >>> merge_states([a, nothing]).out.sum()
    tensor(8.)
    """
    if isinstance(states, str) or not isinstance(states, Sequence):
        raise TypeError(
            f"states must be a sequence of AttentionState, got {type(states).__name__}; "
            "pass [state_a, state_b, ...]"
        )
    if len(states) == 0:
        raise ValueError("states must have at least one state, got none; pass [state_a, state_b, ...]")
    checked = [check_state(state, f"states[{i}]") for i, state in enumerate(states)]
    out, lse = checked[0]
    for i, (other_out, other_lse) in enumerate(checked[1:], start=1):
        for name, mine, first in ((f"states[{i}].out", other_out, out), (f"states[{i}].lse", other_lse, lse)):
            if type(mine) is not type(first):
                check_real(mine, name, first)
                check_real(first, f"states[0].{name[-3:]}", mine)
            if mine.shape != first.shape or mine.dtype != first.dtype or mine.device != first.device:
                raise ValueError(
                    f"{name} must match states[0], {list(first.shape)} {first.dtype} on {first.device}, got "
                    f"{list(mine.shape)} {mine.dtype} on {mine.device}; "
                    "give all states one shape, dtype and device"
                )
    return combine(checked, out.dtype)


def combine(states: Sequence[tuple[Tensor, Tensor]], out_dtype: torch.dtype) -> AttentionState:
    """Merge states that fit together, `out` rounded once, to `out_dtype`."""
    out, lse = states[0]
    if _kernels_may(states):
        from hydragen.backends import states as fused  # noqa: PLC0415 (the library works without triton)

        if fused.serves(states, out_dtype):
            return fused.merge(states, out_dtype)
    wide = torch.float64 if torch.float64 in (out.dtype, lse.dtype) else torch.float32
    merged = decomposed.merge_states([decomposed.State(*(x.to(wide) for x in state)) for state in states])
    return AttentionState(merged.out.to(out_dtype), merged.lse.to(lse.dtype))


def _kernels_may(states: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether a kernel may compute it: on a GPU, with nothing that PyTorch must see into.

    A compiler makes a kernel of PyTorch's operations by itself, and gradients need them.
    """
    if not states[0][0].is_cuda or torch.compiler.is_compiling() or in_transform():
        return False
    tensors = [x for state in states for x in state]
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return all(type(x) is Tensor for x in tensors) and not differentiated and find_spec("triton") is not None


def check_state(state: object, name: str) -> tuple[Tensor, Tensor]:
    """Return (out, lse) if they fit together."""
    if not isinstance(state, tuple) or len(state) != 2 or not all(isinstance(x, Tensor) for x in state):
        raise TypeError(
            f"{name} must be an AttentionState (out, lse) of tensors, got {type(state).__name__}; pass both"
        )
    out, lse = state
    if type(out) is not Tensor or type(lse) is not Tensor:
        check_real(out, f"{name}.out", lse)
        check_real(lse, f"{name}.lse", out)
    if any(x.is_nested or x.layout is not torch.strided for x in state):
        raise TypeError(f"{name} must hold dense tensors, got a sparse or nested one; convert it to dense")
    if not out.is_floating_point() or lse.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must have a floating-point out and a float32 or float64 lse, got {out.dtype} and "
            f"{lse.dtype}; convert them with .to(dtype)"
        )
    if out.dim() < 1 or lse.shape != out.shape[:-1]:
        raise ValueError(
            f"{name}.lse must be shaped like out without its last dimension, {list(out.shape[:-1])}, got "
            f"{list(lse.shape)}; some libraries put heads before tokens: transpose it"
        )
    if out.device != lse.device:
        raise ValueError(f"{name}.lse must be on the device of out, {out.device}, got {lse.device}; move it")
    return out, lse

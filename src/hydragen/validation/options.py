"""Checks of what belongs to a run: scale, masks, cap, sinks, flags and the backend's name."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from hydragen.types import Options
from hydragen.validation.tensors import check_real, check_tensor, shown

BACKENDS = ("auto", "reference", "triton")
# Beyond any position, and far enough from the end of int32 that kernels can add positions to it.
_NO_WINDOW = 2**30
# The kernels work in base 2: scale * log2(e) must be a float32 too.
_LARGEST = torch.finfo(torch.float32).max / 2


def check_backend(backend: str) -> None:
    """Raise unless `backend` names one."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(
            f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {shown(backend)}; "
            "choose one of them"
        )


def check_bool(x: object, name: str) -> None:
    """Raise unless `x` is True or False."""
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be True or False, got {shown(x)}; convert it with bool()")


def check_options(
    q: Tensor,
    scale: object,
    causal: bool,
    window: object,
    softcap: object,
    sinks: object,
    return_lse: bool,
    out_dtype: object,
) -> Options:
    """Return the options of a run on `q` [..., num_q_heads, head_dim], defaults filled in."""
    check_bool(causal, "causal")
    check_bool(return_lse, "return_lse")
    number = float(q.shape[-1] ** -0.5) if scale is None else check_scale(scale, q.dtype)
    return Options(
        number,
        causal,
        None if window is None else _check_window(window),
        None if softcap is None else _check_softcap(softcap, number, q.dtype),
        None if sinks is None else _check_sinks(sinks, q),
        return_lse,
        q.dtype if out_dtype is None else _check_out_dtype(out_dtype, q.dtype),
    )


def check_scale(scale: object, dtype: torch.dtype = torch.float32) -> float:
    """Return the factor of the dot products: any finite number, of any sign."""
    remedy = "None means head_dim ** -0.5"
    number = _check_number(scale, "scale", "a finite number or None", remedy)
    if dtype != torch.float64 and abs(number) > _LARGEST:
        raise ValueError(
            f"scale must be at most {_LARGEST:.3g} in magnitude (logits are float32), got {number!r}; "
            f"{remedy}"
        )
    return number


def _check_out_dtype(out_dtype: object, dtype: torch.dtype) -> torch.dtype:
    allowed = (dtype,) if dtype in (torch.float32, torch.float64) else (dtype, torch.float32)
    if not isinstance(out_dtype, torch.dtype) or out_dtype not in allowed:
        raise TypeError(
            f"out_dtype must be None, {' or '.join(map(str, allowed))} for q in {dtype}, got "
            f"{shown(out_dtype)}; float32 keeps partial results as exact as they were computed"
        )
    return out_dtype


def _check_window(window: object) -> int:
    expected = "window must be None or an integer of at least 1"
    remedy = "window=W lets a query see its own position and the W - 1 before it"
    if isinstance(window, bool) or not isinstance(window, numbers.Integral):
        raise TypeError(f"{expected}, got {shown(window)}; {remedy}")
    if window < 1:
        raise ValueError(f"{expected}, got {window}; {remedy}")
    return min(int(window), _NO_WINDOW)


def _check_softcap(softcap: object, scale: float, dtype: torch.dtype) -> float:
    expected, remedy = "a positive finite number or None", "None means no cap"
    number = _check_number(softcap, "softcap", expected, remedy)
    if number <= 0:
        raise ValueError(f"softcap must be {expected}, got {number!r}; {remedy}")
    smallest = torch.finfo(torch.float32).tiny
    too_far = number < smallest or number > _LARGEST or abs(scale) / number > _LARGEST
    if dtype != torch.float64 and too_far:
        raise ValueError(
            "softcap must be such that softcap and scale / softcap are float32 numbers, got "
            f"softcap={number!r} with scale={scale!r}; {remedy}"
        )
    return number


def _check_number(x: object, name: str, expected: str, remedy: str) -> float:
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name} must be {expected}, got {shown(x)}; {remedy}")
    try:
        number = float(x)
    except OverflowError:  # an integer beyond every float
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be {expected}, got {shown(x)}; {remedy}")
    return number


def _check_sinks(sinks: object, q: Tensor) -> Tensor:
    num_q_heads = q.shape[-2]
    tensor = check_tensor(sinks, "sinks")
    if type(tensor) is not Tensor:
        check_real(tensor, "sinks", q)
    if tensor.shape != (num_q_heads,):
        raise ValueError(
            f"sinks must have shape [num_q_heads] = [{num_q_heads}], got {list(tensor.shape)}; "
            "give one logit per head of q"
        )
    if tensor.device != q.device:
        raise ValueError(
            f"sinks must be on the device of q, {q.device}, got {tensor.device}; move it with .to(device)"
        )
    return tensor

"""What counts as a tensor of queries, keys, values or sinks, and how errors name what was given instead."""

from __future__ import annotations

import reprlib

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(x: object, name: str, like: Tensor | None = None) -> Tensor:
    """Return `x` if it is a dense floating-point tensor with data.

    Parameters
    ----------
    x : object
    name : str
        What the caller calls it; errors begin with it.
    like : tensor, optional
        `q`, whose dtype and device `x` must share.

    Raises
    ------
    TypeError
        If it is no tensor, sparse or nested, or has another dtype.
    ValueError
        If it holds no data (meta, fake or uninitialized) or lives elsewhere.
    """
    if (
        like is not None
        and type(x) is Tensor
        and x.dtype is like.dtype
        and x.device == like.device
        and x.layout is torch.strided
        and not x.is_nested
        and not x.is_neg()
    ):
        return x  # what `like` passed, this has in common with it
    if type(x) is not Tensor:
        check_real(x, name, like)
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {kind(x)}; make one with torch.as_tensor")
    if x.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one; pad it with .to_padded_tensor, or pack it: "
            "cu_seqlens_q for q, a hydragen.PackedKV for keys and values"
        )
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}; convert it with .to_dense()")
    if x.dtype not in DTYPES:
        names = ", ".join(map(str, DTYPES))
        raise TypeError(
            f"{name} must have one of the dtypes {names}, got {x.dtype}; convert it with .to(dtype)"
        )
    if x.is_meta:
        raise ValueError(
            f"{name} must hold data, got a meta tensor; make it on a real device, "
            'e.g. with torch.empty_like(x, device="cpu")'
        )
    if like is not None and x.dtype is not like.dtype:
        raise TypeError(
            f"{name} must have the dtype of q, {like.dtype}, got {x.dtype}; convert one with .to(dtype)"
        )
    if like is not None and x.device != like.device:
        raise ValueError(
            f"{name} must be on the device of q, {like.device}, got {x.device}; move it with .to(device)"
        )
    # the imaginary part of a conjugate is a view with its sign kept aside, where kernels would not see it
    return x.resolve_neg() if x.is_neg() else x


def check_real(x: object, name: str, like: Tensor | None = None) -> None:
    """Raise if `x` is a tensor that is yet to be made, or a fake one that may not meet `like`, a real one."""
    if torch.compiler.is_compiling():
        return  # it has made them alike, and cannot trace these questions
    if isinstance(x, Tensor) and is_lazy(x):
        raise ValueError(
            f"{name} must hold data, got an uninitialized parameter; call .materialize(shape), or run the "
            "module that has it"
        )
    if like is None or isinstance(like, FakeTensor) or not isinstance(x, FakeTensor):
        return
    if not x.fake_mode.allow_non_fake_inputs:
        raise ValueError(
            f"{name} must hold data, got a fake tensor; make all tensors in one FakeTensorMode, or none"
        )


def kind(x: object) -> str:
    """Return the type of `x` as its users write it: int, numpy.ndarray, torch.Tensor."""
    if isinstance(x, type):
        return f"the type {x.__name__}"
    if x is None:
        return "None"
    module = type(x).__module__.partition(".")[0]
    return type(x).__name__ if module == "builtins" else f"{module}.{type(x).__name__}"


def shown(x: object) -> str:
    """Return `x`, shortened, and its type; of tensors and arrays dtype and shape."""
    if isinstance(x, Tensor) and is_lazy(x):
        return kind(x)
    if getattr(x, "ndim", 0) and hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{kind(x)} {x.dtype} {list(x.shape)}"
    return kind(x) if x is None else f"{reprlib.repr(x)} of type {kind(x)}"

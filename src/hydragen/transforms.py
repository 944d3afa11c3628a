"""Function transforms: torch.func, which wraps tensors, and forward-mode derivatives, which add tangents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd import forward_ad

from hydragen_reference.segment import in_transform


def wraps_memory() -> bool:
    """Whether a transform wraps what is allocated now, so that it is of no use afterwards."""
    if not torch._C._are_functorch_transforms_active():  # noqa: SLF001 - torch has no public name
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(torch.empty(0))  # noqa: SLF001 - nor for this


@contextmanager
def lasting_memory() -> Iterator[None]:
    """Allocate what outlives the call: as if no transform, inference mode or fake mode were around it."""
    with (
        torch.inference_mode(False),
        torch._C._DisableFuncTorch(),  # noqa: SLF001 - no public name either
        unset_fake_temporarily(),
    ):
        yield


def check_untransformed(who: str, remedy: str, tensors: Iterable[tuple[str, Tensor | None]]) -> None:
    """Raise if a transform would have to see into what `who` computes.

    Parameters
    ----------
    who, remedy : str
        What has no rules for transforms, and what to do about it; errors begin and end with them.
    tensors : pairs of a name and a tensor
        All that is computed with.

    Raises
    ------
    ValueError
        If a tensor is batched by torch.vmap or has a tangent, or results would be wrapped by a transform.
    """
    if not in_transform():
        return
    for name, x in tensors:
        if x is None:
            continue
        if torch._C._functorch.is_batchedtensor(x):  # noqa: SLF001 - torch.func has no public name for it
            raise ValueError(
                f"{who} cannot be mapped by torch.vmap, but {name} is batched by it; {remedy}, or make the "
                "mapped dimension part of the batch"
            )
        if forward_ad.unpack_dual(x).tangent is not None:
            raise ValueError(
                f"{who} computes no forward-mode derivatives, but {name} has a tangent (torch.func.jvp, "
                f"jacfwd or forward_ad), which would be lost; {remedy}"
            )
    if wraps_memory():
        raise ValueError(
            f"{who} cannot run within torch.func (grad, vjp, jvp, functionalize), which wraps its results; "
            f"{remedy}, or call it outside of the transform"
        )


def check_fake(q: FakeTensor, tensors: Iterable[tuple[str, object]]) -> None:
    """Raise ValueError if a tensor is not of the mode of `q`, and that mode takes no others."""
    if q.fake_mode.allow_non_fake_inputs:
        return
    for name, x in tensors:
        if isinstance(x, Tensor) and not (isinstance(x, FakeTensor) and x.fake_mode is q.fake_mode):
            raise ValueError(
                f"{name} must be of the FakeTensorMode of q, got {type(x).__name__}; call within that mode "
                "(integers on the host become tensors there), with tensors of its from_tensor()"
            )


def check_no_transform(who: str, remedy: str) -> None:
    """Raise within torch.func: what `who` writes to outlives the transform, which would wrap it.

    Raises
    ------
    ValueError
    """
    if torch._C._are_functorch_transforms_active():  # noqa: SLF001 - no public name
        raise ValueError(
            f"{who} must be called outside of torch.func (grad, vjp, jvp, vmap), got a call within; {remedy}"
        )

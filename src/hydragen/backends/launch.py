"""Launching a kernel: through Triton's compiler the first time, directly from then on."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from hydragen.kernels.attend import attend

INTERPRET = not isinstance(attend, triton.JITFunction)


def launch_kernel(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    key: tuple[Any, ...],
    compiled: dict[Any, Any],
) -> None:
    """Launch `kernel` on the current stream.

    Triton's own call binds and specialises every argument anew, which takes longer than many of our kernels
    run. A kernel that has been compiled for the same specialisation is launched without that.

    Parameters
    ----------
    kernel : a function under triton.jit
    grid : programs along each axis
    arguments : every parameter of the kernel in order, constants included
    options : num_warps and the like
    key : everything but the tensors' addresses that Triton specialises on
    compiled : where compiled kernels are kept; it belongs to whoever keeps the tables
    """
    if INTERPRET:
        kernel[grid](*arguments)
        return
    # Triton specialises on 16-byte alignment of every pointer
    where = (kernel.__name__, options.get("launch_pdl"), key, _alignment(arguments))
    found = compiled.get(where)
    if found is None:
        given = {name: value for name, value in options.items() if value}
        compiled[where] = kernel[grid](*arguments, **given)
    else:
        found[grid](*arguments)


def _alignment(arguments: tuple[Any, ...]) -> tuple[bool, ...]:
    flags: list[bool] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            flags.append(argument.data_ptr() % 16 == 0)
        elif isinstance(argument, tuple):
            flags.extend(x.data_ptr() % 16 == 0 for x in argument if isinstance(x, Tensor))
    return tuple(flags)

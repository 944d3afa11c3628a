"""Launching a kernel: through Triton's compiler the first time, directly from then on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor

from hydragen.kernels.attend import attend

LOG2_E = 1.4426950408889634
INTERPRET = not isinstance(attend, triton.JITFunction)

# Compiled kernels by everything that Triton specialises on: another plan of the same kind finds them here.
_COMPILED: dict[Any, Any] = {}


class Launcher:
    """A kernel, its grid and all its arguments but the tensors.

    Triton's own call binds and specialises every argument anew, which takes longer than many of our kernels
    run. A kernel that has been compiled for the same specialisation is launched without that.

    Parameters
    ----------
    kernel : a function under triton.jit
    grid : programs along each axis
    numbers : the arguments after the tensors that are known at run time: ints, floats and tuples of ints
    constants : the tl.constexpr arguments after those
    options : num_warps and the like; what is 0 or False is left out
    kinds : what else decides the compiled code: the tensors' dtypes, the device
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        numbers: tuple[Any, ...],
        constants: tuple[Any, ...],
        options: dict[str, Any],
        kinds: tuple[Any, ...],
    ) -> None:
        self._kernel, self._grid = kernel, grid
        self._rest = (*numbers, *constants)
        self._options = {name: value for name, value in options.items() if value}
        self._key = (kernel, constants, tuple(self._options.items()), kinds, _specialisation(numbers))
        self._ready: dict[tuple[bool, ...], Callable[..., None]] = {}

    def __call__(self, tensors: tuple[Any, ...], aligned: tuple[bool, ...]) -> bool:
        """Launch on the current stream; False: what it leaves is to be merged, if it leaves partial results.

        Parameters
        ----------
        tensors : the kernel's pointers, in order: tensors and tuples of tensors
        aligned : whether each of those that a user may have given begins at a multiple of 16 bytes, which
            Triton specialises on; our own do
        """
        if INTERPRET:
            self._kernel[self._grid](*tensors, *self._rest)
            return False
        run = self._ready.get(aligned)
        if run is not None:
            run(*tensors, *self._rest)
            return False
        key = (self._key, aligned)
        if key in _COMPILED:
            self._ready[aligned] = _COMPILED[key][self._grid]
            self._ready[aligned](*tensors, *self._rest)
        else:
            _COMPILED[key] = self._kernel[self._grid](*tensors, *self._rest, **self._options)
        return False


def alignment(tensors: tuple[Tensor | None, ...]) -> tuple[bool, ...]:
    """Return which tensors begin at a multiple of 16 bytes; None stands for one of our own."""
    return tuple([x is None or not x.data_ptr() & 15 for x in tensors])


def _specialisation(number: Any) -> Any:
    """Return what Triton compiles into the code of a number: that it is 1, a multiple of 16, of 64 bits."""
    if isinstance(number, tuple):
        return tuple([_specialisation(x) for x in number])
    if isinstance(number, float):
        return "float"
    return 1 if number == 1 else (number % 16 == 0, -(2**31) <= number < 2**31)

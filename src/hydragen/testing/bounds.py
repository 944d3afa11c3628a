"""Out-of-bounds reads and writes of Triton kernels, found on a CPU.

Triton's interpreter follows raw pointers, so a kernel that reads past a tensor goes unnoticed unless the
bytes there happen to be NaN. Inside `checked_accesses` every address that a kernel loads from or stores to
must lie in one of the tensors it was launched with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor


class OutOfBoundsError(AssertionError):
    """A kernel touched memory that belongs to none of its arguments."""


@contextmanager
def checked_accesses() -> Iterator[None]:
    """Check every load and store of kernels that run in Triton's interpreter within the block.

    Raises
    ------
    OutOfBoundsError
        From the kernel launch; wrapped in the interpreter's own error, whose text names it.
    """
    from triton.runtime import interpreter  # noqa: PLC0415 (the library works without triton)

    builder = interpreter.interpreter_builder
    kind = type(builder)
    load, store, call = kind.create_masked_load, kind.create_masked_store, interpreter.GridExecutor.__call__
    allowed: list[tuple[int, int]] = []

    def check(ptrs: Any, mask: Any, what: str) -> None:
        # the interpreter keeps some masks as integers
        pointers, chosen = np.asarray(ptrs.data), np.asarray(mask.data).astype(bool)
        addresses = pointers[chosen].reshape(-1).astype(np.int64)
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        inside = np.zeros(addresses.size, bool)
        for begin, end in allowed:
            inside |= (addresses >= begin) & (addresses + size <= end)
        if not inside.all():
            nearest = min(allowed, key=lambda span: abs(span[0] - addresses[~inside][0]), default=(0, 0))
            raise OutOfBoundsError(
                f"{what} of {int((~inside).sum())} elements of {size} bytes outside every argument of the "
                f"kernel, the first {int(addresses[~inside][0]) - nearest[0]} bytes from the start of a "
                f"tensor of {nearest[1] - nearest[0]} bytes"
            )

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        check(ptrs, mask, "load")
        return load(self, ptrs, mask, *rest)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(ptrs, mask, "store")
        return store(self, ptrs, value, mask, *rest)

    def checked_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        allowed[:] = list(_spans((args, tuple(kwargs.values()))))
        return call(self, *args, **kwargs)

    kind.create_masked_load, kind.create_masked_store = checked_load, checked_store
    interpreter.GridExecutor.__call__ = checked_call
    try:
        yield
    finally:
        kind.create_masked_load, kind.create_masked_store = load, store
        interpreter.GridExecutor.__call__ = call


def _spans(value: object) -> Iterator[tuple[int, int]]:
    """Byte ranges of every tensor in nested tuples; of the elements a view can reach, not of its storage."""
    if isinstance(value, tuple):
        for item in value:
            yield from _spans(item)
    elif isinstance(value, Tensor) and value.numel():
        last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        yield value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()

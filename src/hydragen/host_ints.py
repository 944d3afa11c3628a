"""What counts as a vector of integers on the host.

Lengths, indices and token ids come as lists, tuples, numpy arrays or CPU tensors. This module turns them
into one kind of array, or says what is wrong. It knows torch only through the array protocol.
"""

from __future__ import annotations

import operator
import reprlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def as_int_vector(value: object, name: str) -> IntArray:
    """Return `value` as an int64 vector; it may share the memory of `value`.

    Parameters
    ----------
    value : list, tuple, numpy array or CPU tensor of integers, 1-D
        An empty list is an empty vector.
    name : str
        What the caller calls it; errors begin with it.

    Raises
    ------
    TypeError
        If `value` does not hold integers (bool is not an integer) or cannot be read on the host.
    ValueError
        If it is not 1-D, an integer does not fit in int64, or entries are masked.
    """
    try:
        array = np.asarray(value)
    except (TypeError, RuntimeError, ValueError) as error:
        # torch raises all three: for device tensors, bfloat16 or sparse ones, and parameters without a shape
        if isinstance(error, ValueError) and not hasattr(value, "__array__"):
            raise ValueError(
                f"{name} must be a 1-D list of integers, got lists of unequal lengths: {_shortened(value)}; "
                "give one integer per entry"
            ) from None
        raise TypeError(
            f"{name} must be a list, array or CPU tensor of integers, got {_shortened(value)}; "
            "copy a device tensor to the host with .cpu()"
        ) from None
    # numpy gives an empty list a float dtype
    empty_list = array.size == 0 and not hasattr(value, "dtype")
    if array.dtype.kind not in "iu" and not empty_list:
        raise TypeError(
            f"{name} must hold integers that fit in int64, got dtype {array.dtype} from {_shortened(value)}; "
            "convert it with .astype(numpy.int64), or .long() for a tensor"
        )
    if array.ndim != 1:
        raise ValueError(
            f"{name} must be 1-D, got shape {array.shape} from {_shortened(value)}; "
            "give one integer per entry, in a list or a 1-D array"
        )
    # only uint64 holds integers that int64 does not
    if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(
            f"{name} must hold integers that fit in int64, got {array.max()}; "
            "give integers of at most 2**63 - 1"
        )
    if not hasattr(value, "__array__"):
        _check_no_bool(value, name)
    elif isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise ValueError(
            f"{name} must hold an integer in every entry, got {value.size - value.count()} masked ones of "
            f"{value.size}; fill them with .filled(0), or leave them out with .compressed()"
        )
    return array.astype(np.int64, copy=False)


def as_positive_int(value: object, name: str) -> int:
    """Return `value` as a Python integer of at least 1 that fits in int32.

    Raises
    ------
    TypeError
        If `value` is not a single integer (bool is not an integer).
    ValueError
        If it is less than 1 or more than 2**31 - 1.
    """
    expected = f"{name} must be an integer of at least 1"
    number = _as_int(value, expected)
    if number < 1:
        raise ValueError(f"{expected}, got {number}; choose a larger value")
    if number >= 2**31:
        raise ValueError(
            f"{expected} and less than 2**31, got {reprlib.repr(number)}; choose a smaller value"
        )
    return number


def as_index(value: object, name: str, size: int, nouns: str) -> int:
    """Return `value` as an index from 0 to `size` - 1 (negative ones do not wrap around) into `nouns`.

    Raises
    ------
    TypeError
        If `value` is not a single integer (bool is not an integer).
    ValueError
        If it is out of range.
    """
    expected = f"{name} must be the index of one of the {size} {nouns}, counted from 0"
    number = _as_int(value, expected)
    if not 0 <= number < size:
        raise ValueError(f"{expected}, got {number}; choose a value in this range")
    return number


def frozen(array: IntArray) -> IntArray:
    """Make `array` read-only and return it."""
    array.setflags(write=False)
    return array


def _check_no_bool(values: Any, name: str) -> None:
    """Raise if a bool is among what numpy took for integers: it makes True a 1 without a word."""
    for kind in {*map(type, values)} - {int, np.int64, np.int32}:
        for i, x in enumerate(values):
            if type(x) is kind and np.asarray(x).dtype.kind == "b":
                raise TypeError(
                    f"{name} must hold integers, got a bool at index {i} of {_shortened(values)}; "
                    "convert it with int()"
                )


def _as_int(value: object, expected: str) -> int:
    # Arrays, tensors and bool have __index__ too; a tensor's dtype is told by its name, without torch.
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    is_masked = isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value)
    if hasattr(value, "__index__") and not is_bool and not is_masked:
        try:
            return operator.index(value)
        except (TypeError, RuntimeError, ValueError):  # the last two: tensors without data
            pass
    raise TypeError(f"{expected}, got {_shortened(value)}; give a single integer")


def _shortened(value: object) -> str:
    """Return the type and the beginning of `value`, fit for an error message; of arrays, dtype and shape."""
    try:
        if getattr(value, "ndim", 0) > 0 and hasattr(value, "dtype") and hasattr(value, "shape"):
            return f"{type(value).__name__} of dtype {value.dtype} and shape {tuple(value.shape)}"
    except RuntimeError:  # a parameter that has no shape yet
        return type(value).__name__
    return f"{type(value).__name__} {reprlib.repr(value)}"

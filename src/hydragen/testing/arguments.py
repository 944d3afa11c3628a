"""What counts as an integer, a number or a flag: in the fields of a problem, in the limits of strategies."""

from __future__ import annotations

import math
import numbers
import reprlib
from typing import TypeGuard


def integers(name: str, values: object) -> tuple[int, ...]:
    """Return a tuple or list of integers as Python's own.

    Raises
    ------
    TypeError
    """
    if not isinstance(values, (tuple, list)):
        raise TypeError(
            f"{name} must be a tuple of integers, got {_shown(values)}; give one integer per entry"
        )
    for value in values:
        if not _is_integer(value):
            raise TypeError(f"{name} must hold integers, got {_shown(value)}; convert it with int()")
    return tuple(int(value) for value in values)


def integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """Return an integer from `least` to `most`, as Python's own; bool is not an integer.

    Raises
    ------
    TypeError, ValueError
    """
    if not _is_integer(value):
        raise TypeError(f"{name} must be an integer, got {_shown(value)}; convert it with int()")
    number = int(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {reprlib.repr(number)}; choose a larger one")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, got {reprlib.repr(number)}; choose a smaller one")
    return number


def finite(name: str, value: object, expected: str) -> float:
    """Return a finite number: an int or a float as it is, others of numpy and the like as a float.

    Raises
    ------
    TypeError, ValueError
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {expected}, got {_shown(value)}; None is the default")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond every float
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be {expected}, got {reprlib.repr(value)}; None is the default")
    return value if isinstance(value, int) else number


def flag(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False: "no" would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_shown(value)}; convert it with bool()")


def _is_integer(value: object) -> TypeGuard[numbers.Integral]:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _shown(value: object) -> str:
    return f"{reprlib.repr(value)} of type {type(value).__name__}"

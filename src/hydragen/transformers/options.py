"""Names of keyword arguments that are handed on to another function."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def check_options(names: Iterable[str], function: Callable[..., Any], called: str) -> None:
    """Raise a TypeError if `function` does not know a keyword argument; `called` is what the user called."""
    kind = inspect.Parameter.KEYWORD_ONLY
    known = [x.name for x in inspect.signature(function).parameters.values() if x.kind is kind]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
            raise TypeError(f"{called} got an unexpected keyword argument {name!r}; {remedy}")

"""Capabilities as text, on the command line and in configurations, and as Python values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch

from hydragen.testing.problem import DTYPES, SHARPNESS, Sharpness
from hydragen.testing.strategies import Trees

Option = Literal["yes", "no", "always"]
"""Whether an option of the call is known; ``always``: the implementation knows no call without it."""

_OPTIONS: dict[object, Option] = {True: "yes", False: "no", "yes": "yes", "no": "no", "always": "always"}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def parsed(settings: Sequence[str], source: str) -> dict[str, object]:
    """``name=value`` texts as a mapping.

    Raises
    ------
    ValueError
        If a text has no ``=``.
    """
    values: dict[str, object] = {}
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator:
            raise ValueError(f"{source}: must be name=value, got {setting!r}; for example causal=no")
        values[name.strip()] = value.strip()
    return values


def _lower(value: object) -> object:
    """Text in any case, and true and false for yes and no."""
    text = value.lower() if isinstance(value, str) else ""
    return {"true": "yes", "false": "no"}.get(text, text) or value


def _bool(value: object) -> bool:
    known: dict[object, bool] = {True: True, False: False, "yes": True, "no": False}
    return known[_lower(value)]


def _items(value: object) -> list[Any]:
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _integers(value: object) -> tuple[int, ...]:
    return tuple(int(item) for item in _items(value))


def _dtypes(value: object) -> tuple[torch.dtype, ...]:
    return tuple(item if isinstance(item, torch.dtype) else _DTYPES[item] for item in _items(value))


def _trees(value: object) -> Trees:
    known: dict[object, Trees] = {name: name for name in get_args(Trees)}
    return known[value]


def _sharpness(value: object) -> tuple[Sharpness, ...]:
    known = {name: name for name in SHARPNESS}
    return tuple(known[item] for item in _items(value))


def _option(value: object) -> Option:
    return _OPTIONS[_lower(value)]


def _device(value: object) -> str:
    try:
        device = torch.device(str(value))
    except RuntimeError:
        raise ValueError("a device is cpu, cuda, cuda:1 or the like") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU on this machine")
    return str(device)


def _lse(value: object) -> bool | None:
    return None if value is None else _bool(value)


READERS: dict[str, Callable[[Any], Any]] = {
    "dtypes": _dtypes,
    "head_dims": _integers,
    "same_head_dim_v": _bool,
    "gqa": _bool,
    "group_sizes": _integers,
    "trees": _trees,
    "paged": _bool,
    "strides": _bool,
    "same_q_len": _bool,
    "empty": _bool,
    "poison": _bool,
    **dict.fromkeys(("causal", "window", "softcap", "scale", "sinks"), _option),
    "lse": _lse,
    "repeatable": _bool,
    "sharpness": _sharpness,
    **dict.fromkeys(("max_kv_heads", "max_nodes", "max_rows", "max_q_len", "max_kv"), int),
    "device": _device,
}


def reason(name: str, error: Exception) -> str:
    """What is wrong with a value of a capability, and what it may be."""
    if not isinstance(error, KeyError):
        return f"{error} (docs/conformance.md, Capabilities, has the values)"
    choices = {
        "dtypes": ", ".join(_DTYPES),
        "trees": ", ".join(get_args(Trees)),
        "sharpness": ", ".join(SHARPNESS),
    }
    options = "yes, no, always" if READERS[name] is _option else "yes, no"
    return f"choose from {choices.get(name, options)}"


def as_text(value: object) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(as_text(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).removeprefix("torch.")

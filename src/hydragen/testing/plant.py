"""Plant a bug in a module, to prove that a suite catches it.

The patched source is written to a file and imported from there: Triton reads a kernel's source from its file.
Works for kernels in Triton's interpreter. A compiled kernel keeps the primitives that it was first compiled
with; plant those in a fresh process.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

_numbers = itertools.count(1)
_directory = tempfile.TemporaryDirectory(prefix="hydragen-planted-")  # removed when the process ends


def plant(module: ModuleType | str, old: str, new: str) -> ModuleType:
    """A copy of a module in which one piece of source text is replaced.

    The module itself and everything that uses it stay as they are; see `planted` for that.

    Parameters
    ----------
    module
        A module written in Python, or its name.
    old, new
        What to replace, and by what.

    Raises
    ------
    ValueError
        If ``old`` does not stand in the source exactly once, or ``new`` is the same text.
    """
    original = importlib.import_module(module) if isinstance(module, str) else module
    file = getattr(original, "__file__", None)  # modules that are part of the interpreter have none
    if file is None or not file.endswith(".py"):
        raise ValueError(f"module must be written in Python, got {original.__name__} from {file}")
    source = Path(file).read_text(encoding="utf-8")
    found = source.count(old) if old else 0
    if found != 1:
        raise ValueError(
            f"old must stand exactly once in {original.__name__}, found {found} times: {old!r}; "
            "quote more or less of it"
        )
    if old == new:
        raise ValueError(f"new must differ from old, got {new!r} for both")
    # The name stays within the package, so that relative imports work.
    name = f"{original.__name__}__planted_{next(_numbers)}"
    path = Path(_directory.name) / f"{name}.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"module must be importable from a file, got {original.__name__}")
    patched = importlib.util.module_from_spec(spec)
    patched.__package__ = original.__package__
    sys.modules[name] = patched  # dataclasses and Triton look their module up
    try:
        spec.loader.exec_module(patched)
    except BaseException:
        del sys.modules[name]
        raise
    return patched


@contextmanager
def planted(module: ModuleType | str, old: str, new: str) -> Iterator[ModuleType]:
    """Within the context, every module of the package uses the patched copy.

    A function, class or kernel of the original is replaced wherever a module of the same top-level package
    holds it as a global, and a changed constant wherever one holds it under its own name. What was put into a
    container, a default argument or a cache is not replaced: plant before the first call, or clear the
    caches.

    Parameters
    ----------
    module, old, new
        As in `plant`.

    Raises
    ------
    ValueError
        As in `plant`.
    """
    original = importlib.import_module(module) if isinstance(module, str) else module
    patched = plant(original, old, new)
    package = original.__name__.partition(".")[0]
    users = _modules(package, patched)
    originals: dict[int, Any] = {}
    replaced: list[tuple[ModuleType, str, Any]] = []
    try:
        for name, value in list(vars(original).items()):
            if name.startswith("__") or isinstance(value, ModuleType) or name not in vars(patched):
                continue
            substitute = vars(patched)[name]
            if substitute is value:  # imported from elsewhere, or a constant that did not change
                continue
            originals[id(substitute)] = value
            made_here = _made_by(value, original)
            for user in users:
                for alias, held in list(vars(user).items()):
                    if held is value and (made_here or alias == name):
                        replaced.append((user, alias, held))
                        setattr(user, alias, substitute)
        yield patched
    finally:
        for user, alias, held in reversed(replaced):
            setattr(user, alias, held)
        # what was first imported meanwhile took the substitutes for the originals
        for user in _modules(package, patched):
            if user not in users:
                for alias, held in list(vars(user).items()):
                    if id(held) in originals and _made_by(held, patched):
                        setattr(user, alias, originals[id(held)])
        sys.modules.pop(patched.__name__, None)


def _modules(package: str, patched: ModuleType) -> list[ModuleType]:
    """What is loaded of a package, apart from the patched copy."""
    return [
        user
        for name, user in list(sys.modules.items())
        if isinstance(user, ModuleType) and name.partition(".")[0] == package and user is not patched
    ]


def _made_by(value: Any, module: ModuleType) -> bool:
    """Whether a module defines this function or class; a kernel says so through the function it wraps."""
    return module.__name__ in (
        getattr(value, "__module__", None),
        getattr(getattr(value, "fn", None), "__module__", None),
    )

"""Numbers that stand for objects in compiled graphs, which hold tensors and numbers only."""

from __future__ import annotations

import secrets
import weakref
from typing import NoReturn

_objects: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()


def new_handle(thing: object) -> int:
    """Return a number by which `thing` can be found while it lives."""
    # random: a graph that was saved with the number must not find something else in another process
    handle = secrets.randbits(62)
    _objects[handle] = thing
    return handle


def of_handle(handle: int) -> object:
    """Return what a handle stands for; ValueError if it no longer exists."""
    thing = _objects.get(handle)
    if thing is None:
        raise ValueError(
            f"handle must be that of a Plan or PrefixTree that lives in this process, got {handle}; keep the "
            "one that was compiled or exported alive, and export anew in another process"
        )
    return thing


class NotCopied:
    """What owns memory at addresses that captured graphs know: copies would share it, or know no graph."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse copy, deepcopy and pickle."""
        raise TypeError(
            f"a {type(self).__name__} cannot be copied or pickled, since it owns memory that captured graphs "
            "know by its address; make another with hydragen.plan"
        )

"""Calls that fail halfway: the cache goes back to what it held before them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hydragen.transformers.cache import PrefixCache


@contextmanager
def undone_on_failure(cache: PrefixCache) -> Iterator[None]:
    """Let the rows of `cache` hold what they held before, if the block fails or is interrupted.

    Tokens that came meanwhile are not counted any more. Nothing is copied for that: what a row holds is never
    written again, and where rows had to move, each layer still knows where its tokens lie.
    """
    # SLF001: what is known of the rows' ends belongs to the cache, which asks for this
    rows, logits, pending = cache.rows.mark(), cache._logits, cache._pending  # noqa: SLF001
    try:
        yield
    except BaseException:  # KeyboardInterrupt too
        cache.rows.go_back(rows)
        cache._logits, cache._pending = logits, pending  # noqa: SLF001
        raise

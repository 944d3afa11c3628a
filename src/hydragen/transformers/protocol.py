"""What transformers and Python ask of a cache, beside its layers: to be taken, copied, or refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import numpy as np
from torch import Tensor
from transformers.cache_utils import Cache

from hydragen.host_ints import as_int_vector
from hydragen.transformers.logits import LastLogits, Pending
from hydragen.transformers.support import check_generate

if TYPE_CHECKING:
    from hydragen.transformers.cache import PrefixCache


_F = TypeVar("_F", bound=Callable[..., Any])
_TAKING = threading.Lock()


def alone(method: _F) -> _F:
    """Let one thread at a time change a cache: another one gets a RuntimeError, not other rows' tokens."""

    @wraps(method)
    def guarded(self: CacheProtocol, *given: Any, **named: Any) -> Any:
        me = threading.get_ident()
        with _TAKING:
            before, other = self._thread, self._thread not in (None, me)
            if not other:
                self._thread = me
        if other:
            raise RuntimeError(
                "this PrefixCache is in use by another thread; let each thread go on from a fork() of its own"
            )
        try:
            return method(self, *given, **named)
        finally:
            self._thread = before

    return cast("_F", guarded)


class CacheProtocol(Cache):  # type: ignore[misc]  # mypy does not read transformers
    """The part of PrefixCache that others call."""

    _logits: LastLogits
    _pending: Pending
    _thread: int | None = None  # that changes it now

    @property
    def _is_user_defined(self) -> bool:
        return True

    @_is_user_defined.setter
    def _is_user_defined(self: PrefixCache, _: bool) -> None:
        # transformers' generate marks the caches it is given when it begins: a new prompt, to be checked.
        check_generate(self.model)
        self.check_weights()
        if self._weights.seen is None:
            self._weights.see(self.model)
        self.rows.forget_announcements()
        self.rows.fresh = True
        self._pending = Pending.none(self.num_rows)  # generate feeds whole sequences

    @alone
    def reorder_cache(self: PrefixCache, beam_idx: Tensor) -> None:
        """Let row i continue what row beam_idx[i] was, as beam search does between steps.

        Rows keep their room: ValueError where what one is to hold does not fit; `branch` has no such limit.
        """
        self._count_rows()
        self.rows.check_whole()
        chosen = as_int_vector(beam_idx.cpu() if isinstance(beam_idx, Tensor) else beam_idx, "beam_idx")
        self.rows.check_order(chosen)
        for layer in self.layers:
            layer.reorder(chosen)
        self.rows.permute(chosen)
        self._logits, self._pending = self._logits.of_rows(chosen), self._pending.of_rows(chosen)

    def __repr__(self: PrefixCache) -> str:
        lens = self.lengths
        held = f"lengths={lens.min()} to {lens.max()}, " if lens.size else ""
        stored = f"stored_tokens={self.stored_tokens}, layers={len(self.layers)}"
        return f"PrefixCache(rows={lens.size}, {held}{stored})"

    @contextmanager
    def undone_on_failure(self: PrefixCache) -> Iterator[None]:
        """Let the rows hold what they held before, if the block fails or is interrupted.

        Tokens that came meanwhile are not counted any more. Nothing is copied for that: what a row holds is
        never written again, and where rows had to move, each layer still knows where its tokens lie.
        """
        rows, logits, pending = self.rows.mark(), self._logits, self._pending
        try:
            yield
        except BaseException:  # KeyboardInterrupt too
            self.rows.go_back(rows)
            self._logits, self._pending = logits, pending
            raise

    def __copy__(self: PrefixCache) -> PrefixCache:
        return self.branch(np.arange(self.num_rows)) if self.num_rows else type(self)(self.model)

    def __deepcopy__(self: PrefixCache, memo: dict[int, Any]) -> PrefixCache:
        # What goes on apart is the rows; a copy of the model would have other weights.
        copy = memo[id(self)] = self.__copy__()
        return copy

    def __reduce_ex__(self, _: Any) -> NoReturn:
        raise TypeError(
            "a PrefixCache cannot be pickled, since it belongs to a model in this process; keep the token "
            "ids and prefill them again, or copy it with cache.fork()"
        )

    def _unsupported(self, *_: object, **__: object) -> NoReturn:
        raise NotImplementedError(
            "a PrefixCache takes no tokens back and keeps its rows: assisted, contrastive and prompt-lookup "
            "decoding cannot use it; greedy, sampling and beam search can"
        )

    crop = batch_repeat_interleave = batch_select_indices = early_initialization = _unsupported

"""New keys and values to where they belong in a cache, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Slots(NamedTuple):
    """Where new tokens go. None that differ go to the same place.

    Attributes
    ----------
    place : one or two int64 tensors [tokens] or [num_rows, q_len]
        Indices into the first dimensions of a cache.
    source : int64, of the same shape, optional
        Which of all new tokens, row after row, goes there; by default each in turn.
    fresh : bool, of the same shape, optional
        Whether it is written; if not, what is there is kept.
    """

    place: tuple[Tensor, ...]
    source: Tensor | None = None
    fresh: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Return all that there are."""
        return [x for x in (*self.place, self.source, self.fresh) if x is not None]


def write(caches: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], slots: Slots) -> None:
    """Write new tokens.

    Parameters
    ----------
    caches : tensors [..., num_kv_heads, head_dim], and head_dim_v
        Of as many dimensions before the heads as `slots.place` has tensors.
    new : tensors [num_rows, q_len, num_kv_heads, head_dim], and head_dim_v
    slots : Slots
    """
    at = tuple([index.flatten() for index in slots.place])
    for cache, x in zip(caches, new, strict=True):
        tokens = x.flatten(0, 1)
        if slots.source is not None:
            tokens = tokens[slots.source.flatten()]
        if slots.fresh is not None:
            tokens = torch.where(slots.fresh.flatten()[:, None, None], tokens, cache[at])
        if len(at) == 2:
            cache.index_put_(at, tokens)
        elif in_words(cache) and in_words(tokens):  # elements are copied one by one: the fewer the better
            cache.view(torch.int64).index_copy_(0, at[0], tokens.view(torch.int64))
        else:
            cache.index_copy_(0, at[0], tokens)


def in_words(x: Tensor) -> bool:
    """Whether `x` can be viewed as words of eight bytes along its last dimension."""
    sizes = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    return x.stride(-1) == 1 and all(size * x.element_size() % 8 == 0 for size in sizes)

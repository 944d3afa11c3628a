"""How many tokens a forward pass brings to each row, from what a model hands on to its attention."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hydragen.host_ints import IntArray


def count_new_tokens(
    begin: IntArray, q_len: int, position_ids: Tensor | None, mask: Tensor | None, *, first: bool
) -> IntArray:
    """Return how many of the q_len columns of each row are new tokens, at the right end, int64 [rows].

    Parameters
    ----------
    begin : int64 [rows]
        Tokens that the cache holds of each row.
    q_len : int
    position_ids : tensor [rows or 1, q_len], optional
    mask : bool tensor [rows, q_len or all tokens], optional
        Which tokens are no padding.
    first : bool
        The first pass of a prompt: positions are compared. After it every row gets one token a step.

    Raises
    ------
    ValueError, TypeError
        If tokens are padded on the right, rows get none, or positions or the mask do not go on where the
        cache ends.
    """
    if q_len == 1 and not first:
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(
                "attention_mask must be 1 for a step's new tokens, got 0; a row that is done goes on with "
                "any token, or leave it out: cache.branch(rows)"
            )
        return np.ones(begin.size, dtype=np.int64)
    if position_ids is None or position_ids.dim() != 2:
        raise TypeError(
            "this model does not hand [rows, tokens] position_ids on to its attention, so rows cannot be "
            "told from padding; use hydragen.generate or cache.generate, which know them"
        )
    positions = position_ids.expand(begin.size, -1).cpu().numpy()
    seen = None if mask is None else mask.cpu().numpy()
    new = positions >= begin[:, None]
    if seen is not None:
        new &= seen[:, -q_len:]
    counts: IntArray = new.sum(axis=1, dtype=np.int64)
    if (np.diff(new.astype(np.int8), axis=1) < 0).any():
        raise ValueError("prompts must be padded on the left; set tokenizer.padding_side = 'left'")
    wrong = np.flatnonzero(counts == 0)
    if wrong.size:
        row = int(wrong[0])
        raise ValueError(
            f"input_ids must bring at least one new token for every row, got none for row {row}: its cache "
            f"already holds {begin[row]} tokens; cache all but the last token of a prompt, and call "
            "cache.reset() or fork again before you use a cache for another prompt"
        )
    expected = begin[:, None] + np.arange(q_len) - (q_len - counts)[:, None]
    wrong = np.flatnonzero((new & (positions != expected)).any(axis=1))
    if wrong.size:
        row = int(wrong[0])
        raise ValueError(
            f"positions of row {row} must go on at {begin[row]}, where its cache ends, got "
            f"{positions[row, q_len - counts[row]]}; pass the whole sequence with attention_mask, and fork "
            "the cache into rows of the same prompts in the same order"
        )
    if seen is not None and seen.shape[1] > q_len:
        _check_whole_mask(seen, begin, counts)
    return counts


def _check_whole_mask(seen: NDArray[np.bool_], begin: IntArray, counts: IntArray) -> None:
    """Raise a ValueError if a whole sequence's mask leaves out tokens that the cache holds.

    Padding stands before a row's first token, or between what is cached and what is new.
    """
    before = seen.cumsum(axis=1)
    holes = (~seen & (before > 0) & (before < begin[:, None])).any(axis=1)
    wrong = np.flatnonzero(holes | (before[:, -1] != begin + counts))
    if wrong.size:
        row = int(wrong[0])
        raise ValueError(
            f"attention_mask must be 1 for all {begin[row]} tokens that the cache holds of row {row} and for "
            f"its new ones, and 0 for padding, got {before[row, -1]} ones; what a cache holds cannot be left "
            "out"
        )

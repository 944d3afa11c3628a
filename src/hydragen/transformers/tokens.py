"""Token ids as callers give them, brought to one vector per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydragen.host_ints import IntArray, as_int_vector


def is_prompt(x: object) -> bool:
    """Whether `x` is one prompt: a text, or a vector of token ids."""
    if isinstance(x, str):
        return True
    if isinstance(x, Tensor | np.ndarray):
        return x.ndim == 1
    return isinstance(x, Sequence) and len(x) > 0 and all(isinstance(i, int | np.integer) for i in x)


def token_rows(input_ids: object, name: str) -> list[IntArray]:
    """Return token ids as one vector per row, from one vector, several, or a tensor [rows, len]."""
    if isinstance(input_ids, str) or not isinstance(input_ids, Sequence | Tensor | np.ndarray):
        raise TypeError(
            f"{name} must be token ids, or a list of them per row, got {type(input_ids).__name__}; "
            "give a text as its tokens: tokenizer(text).input_ids"
        )
    if is_prompt(input_ids):
        return [token_row(input_ids, name)]
    if any(isinstance(row, str) for row in input_ids):
        raise TypeError(f"{name} must be token ids, got texts; give their tokens: tokenizer(texts).input_ids")
    return [token_row(row, f"{name}[{i}]") for i, row in enumerate(input_ids)]


def token_row(ids: Any, name: str) -> IntArray:
    """Return one vector of token ids."""
    return as_int_vector(ids.detach().cpu() if isinstance(ids, Tensor) else ids, name)


def check_vocabulary(ids: IntArray, size: int, name: str) -> None:
    """Raise a ValueError unless all ids are tokens of a vocabulary of `size`."""
    if ids.size and not 0 <= ids.min() <= ids.max() < size:
        raise ValueError(
            f"{name} must be tokens of the model's vocabulary, 0 to {size - 1}, got {ids.min()} to "
            f"{ids.max()}; use the tokenizer that belongs to the model"
        )


def left_padded(ids: Sequence[IntArray], begin: IntArray) -> tuple[Tensor, Tensor]:
    """Return ids and positions, row i beginning at begin[i], int64 [rows, longest] with zeros on the left."""
    tokens = np.zeros((len(ids), max(x.size for x in ids)), dtype=np.int64)
    positions = np.zeros_like(tokens)
    for i, x in enumerate(ids):
        tokens[i, -x.size :] = x
        positions[i, -x.size :] = begin[i] + np.arange(x.size)
    return torch.from_numpy(tokens), torch.from_numpy(positions)


def row_groups(counts: IntArray, most: int) -> list[IntArray]:
    """Split rows that get tokens into groups of at most `most` tokens with padding, longest rows first."""
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    groups = []
    while order.size:
        size = max(1, most // int(counts[order[0]]))
        groups.append(np.sort(order[:size]))
        order = order[size:]
    return groups

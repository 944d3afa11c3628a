"""What is known of each row's end: the logits after its last token, and the token chosen but not yet fed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hydragen.host_ints import IntArray


class LastLogits(NamedTuple):
    """Logits that follow the last token of each row.

    Attributes
    ----------
    values : tensor [kept, vocabulary], or None
    kept_at : int64 [rows]
        Where each row's logits are kept; -1 if they are not known.
    lengths : int64 [rows]
        How long each row was when they were computed: another length, and they are stale.
    """

    values: Tensor | None
    kept_at: IntArray
    lengths: IntArray

    @classmethod
    def none(cls, size: int) -> LastLogits:
        """Nothing known about any row."""
        return cls(None, np.full(size, -1), np.full(size, -1))

    def updated(self, rows: IntArray, logits: Tensor, lengths: IntArray) -> LastLogits:
        """Return these with `logits` [len(rows), vocabulary] for `rows`, rows being `lengths` long now."""
        index, noted = self.kept_at.copy(), self.lengths.copy()
        index[rows], noted[rows] = -1, lengths[rows]
        used = np.unique(index[index >= 0])
        kept = [] if self.values is None else [self.values[torch.from_numpy(used).to(logits.device)]]
        known = index >= 0
        index[known] = np.searchsorted(used, index[known])
        index[rows] = used.size + np.arange(rows.size)
        return LastLogits(torch.cat([*kept, logits]), index, noted)

    def of_rows(self, rows: IntArray) -> LastLogits:
        """Return those of rows that continue `rows`."""
        return LastLogits(self.values, self.kept_at[rows], self.lengths[rows])

    def get(self, rows: IntArray, lengths: IntArray) -> Tensor:
        """Return logits [rows, vocabulary] of `rows`; ValueError unless all rows are `lengths` long."""
        wrong = rows[(self.kept_at[rows] < 0) | (self.lengths[rows] != lengths[rows])]
        if wrong.size or self.values is None:
            raise ValueError(
                f"row {wrong[:1].tolist()} must have just been extended, so that its next token is known, "
                "got one that ends elsewhere; extend the cache with the tokens to go on from, after the "
                "model's own generate beginning with the last that it handed out, which it has not fed"
            )
        return self.values[torch.from_numpy(self.kept_at[rows]).to(self.values.device)]


class Pending(NamedTuple):
    """Tokens that were generated last and have not been through the model.

    Attributes
    ----------
    tokens : int64 [rows]
        -1 where there is none.
    lengths : int64 [rows]
        How long each row was when its token was chosen: another length, and somebody has fed it since.
    """

    tokens: IntArray
    lengths: IntArray

    @classmethod
    def none(cls, size: int) -> Pending:
        """No row has one."""
        return cls(np.full(size, -1), np.full(size, -1))

    def noted(self, rows: IntArray, tokens: IntArray, lengths: IntArray) -> Pending:
        """Return these with `tokens` for `rows`, all rows being `lengths` long now."""
        all_tokens, noted = self.tokens.copy(), self.lengths.copy()
        all_tokens[rows], noted[rows] = tokens, lengths[rows]
        return Pending(all_tokens, noted)

    def of_rows(self, rows: IntArray) -> Pending:
        """Return those of rows that continue `rows`."""
        return Pending(self.tokens[rows], self.lengths[rows])

    def get(self, lengths: IntArray) -> IntArray:
        """Return the token of each row, -1 where there is none, all rows being `lengths` long."""
        return np.where(self.lengths == lengths, self.tokens, -1)

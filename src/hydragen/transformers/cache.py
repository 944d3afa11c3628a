"""PrefixCache: what sequences share is stored once, for transformers models."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hydragen.host_ints import IntArray, as_int_vector, frozen
from hydragen.transformers.layers import PrefixLayer, take_handed_over
from hydragen.transformers.levels import Level
from hydragen.transformers.logits import LastLogits, Pending
from hydragen.transformers.options import check_options
from hydragen.transformers.protocol import CacheProtocol, alone
from hydragen.transformers.rows import Rows
from hydragen.transformers.support import (
    attention_of,
    check_model,
    check_tokens,
    expands_cached,
    layer_windows,
    stored_positions,
    text_config,
)
from hydragen.transformers.tokens import left_padded, row_groups, token_rows
from hydragen.transformers.weights import Weights

if TYPE_CHECKING:
    from hydragen.transformers.generate import Completion

# Tokens that go through the model together in a prefill: enough to fill a GPU, bounded activations.
PREFILL_TOKENS = 8192


class PrefixCache(CacheProtocol):
    """A key-value cache in which rows share the tokens they have in common.

    Row r holds a path of shared tokens, stored once and read once per step for all rows, and a tail of its
    own that grows. `prefill` runs prompts, `fork` makes rows that share what is there, and `generate` here or
    the model's own `generate(ids, past_key_values=cache)` continues them.

    What fails or is interrupted in here leaves the cache as it was. The model's own `generate` leaves what it
    has fed: all that it handed out but the last token; if a forward pass broke off, nothing until `reset`.
    Calls from a second thread meanwhile raise a RuntimeError; it may have a fork.

    Parameters
    ----------
    model : transformers causal LM
        With attn_implementation="hydragen".

    Raises
    ------
    TypeError, ValueError
        If the model cannot work over shared prefixes, and why.

    Examples
    --------
    >>> prefix = PrefixCache(model).prefill(system_ids)  # doctest: +SKIP
    >>> model.generate(ids, past_key_values=prefix.fork(8), num_return_sequences=8)  # doctest: +SKIP
    """

    def __init__(self, model: PreTrainedModel) -> None:
        rows = Rows.none(len(layer_windows(check_model(model))), model.device, stored_positions(model))
        self._start(model, rows, frozenset(map(id, model.modules())))
        self._weights = Weights()
        self._begin(LastLogits.none(0), Pending.none(0))

    def _start(self, model: PreTrainedModel, rows: Rows, modules: frozenset[int]) -> None:
        self.model, self.rows, self._modules = model, rows, modules
        # Prefill wants no logits but the last ones; most models can leave the others out.
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._only_last = {"logits_to_keep": 1} if keeps else {}
        expands, used = expands_cached(model), partial(attention_of, text_config(model))
        windows = enumerate(layer_windows(model))
        layers = [PrefixLayer(i, rows, window, expands, used, modules) for i, window in windows]
        super().__init__(layers=layers)

    def _begin(self, logits: LastLogits, pending: Pending) -> None:
        """Take over what is known of the rows' ends; `reset` comes back to it."""
        self._logits, self._pending, self._origin = logits, pending, (logits, pending)

    @property
    def num_rows(self) -> int:
        """Sequences that this cache continues; 0 before the first prefill."""
        return self.rows.size

    @property
    def lengths(self) -> IntArray:
        """Tokens of each row, shared ones included, int64 [num_rows]."""
        return frozen(self.rows.path_lens + self.rows.lens)

    @property
    def next_positions(self) -> IntArray:
        """Where the next token of each row will stand, int64 [num_rows].

        One more than `lengths` has for rows whose last generated token has not been fed yet.
        """
        self._count_rows()
        return frozen(self.lengths + (self._pending.get(self.lengths) >= 0))

    @property
    def stored_tokens(self) -> int:
        """Tokens that are stored, each once."""
        return int(sum(level.lens.sum() for level in self.rows.levels) + self.rows.lens.sum())

    @alone
    def prefill(self, input_ids: object) -> PrefixCache:
        """Run prompts through the model, so that rows begin with them.

        Parameters
        ----------
        input_ids : integers [len]; or one such per row, as a list or a tensor [num_rows, len], unpadded

        Raises
        ------
        ValueError
            If the cache has rows already, or a prompt is empty or longer than the model's positions.
        """
        if self.num_rows:
            raise ValueError(
                f"prefill needs an empty cache, got one with {self.num_rows} rows; extend() adds tokens to "
                "its rows, fork() makes new rows that share them"
            )
        prompts = token_rows(input_ids, "input_ids")
        empty = [i for i, ids in enumerate(prompts) if ids.size == 0]
        if empty:
            raise ValueError(f"input_ids[{empty[0]}] must hold a token or more, got none; leave it out")
        if not prompts:
            raise ValueError("input_ids must hold a prompt or more, got none; pass token ids")
        check_tokens(self.model, prompts, np.zeros(len(prompts), dtype=np.int64))
        self.rows.adopt(len(prompts))
        self._logits, self._pending = LastLogits.none(len(prompts)), Pending.none(len(prompts))
        try:
            return self.extend(prompts)
        except BaseException:
            self.reset()
            raise

    @alone
    def extend(self, input_ids: object) -> PrefixCache:
        """Run more tokens through the model, appended to the rows; rows may get none.

        Parameters
        ----------
        input_ids : integers [len] for the one row there is; or one such per row
        """
        self.check_weights()
        self._count_rows()
        given = token_rows(input_ids, "input_ids")
        if len(given) != self.num_rows:
            raise ValueError(
                f"input_ids must hold one list of tokens per row, {self.num_rows}, got {len(given)}; give "
                "rows that get nothing an empty list"
            )
        check_tokens(self.model, given, self.next_positions)
        # The last token that was generated has not been through the model yet.
        waiting = self._pending.get(self.lengths)[:, None]
        new = [np.append(first[first >= 0], ids) for first, ids in zip(waiting, given, strict=True)]
        counts = np.array([ids.size for ids in new], dtype=np.int64)
        self.rows.reserve(counts)
        with self.undone_on_failure():
            for group in row_groups(counts, PREFILL_TOKENS):
                for begin in range(0, int(counts[group].max()), PREFILL_TOKENS):
                    live = group[counts[group] > begin]
                    logits = self._run(live, [new[row][begin : begin + PREFILL_TOKENS] for row in live])
                    self._logits = self._logits.updated(live, logits, self.lengths)
        self._pending = Pending.none(self.num_rows)
        self._weights.see(self.model)
        return self

    def fork(self, n: int | Sequence[int] = 1) -> PrefixCache:
        """Make a cache whose rows share what the rows of this one hold; nothing is copied.

        Row r becomes n (or n[r]) rows, side by side. This cache stays as it is; forks see no later tokens.

        Parameters
        ----------
        n : int, or one int per row
        """
        several = not isinstance(n, (int, np.integer)) or isinstance(n, bool)
        counts = as_int_vector(n, "n") if several else np.full(self.num_rows, n)
        if counts.size != self.num_rows or (counts < 0).any() or counts.sum() < 1:
            raise ValueError(
                f"n must be a positive int, or {self.num_rows} of them, one per row, got {n!r} for "
                f"{self.num_rows} rows; prefill a prompt before you fork it"
            )
        return self.branch(np.repeat(np.arange(self.num_rows), counts))

    def branch(self, rows: object) -> PrefixCache:
        """Make a cache whose row i continues row rows[i] of this one: `fork` with any assignment."""
        self.check_weights()
        self._count_rows()
        self.rows.check_whole()
        mine, chosen = self.rows, as_int_vector(rows, "rows").copy()
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < self.num_rows:
            raise ValueError(f"rows must be rows of this cache, 0 to {self.num_rows - 1}, got {rows!r}")
        forked = PrefixCache.__new__(PrefixCache)
        levels, parents = mine.levels, mine.parents[chosen]
        if mine.lens.any():
            tails = tuple(layer.shared_tail() for layer in self.layers)
            levels, parents = (*levels, Level(mine.parents, frozen(mine.lens.copy()), tails)), chosen
        # SLF001: another object of this class, which no caller could fill in
        rows_of_fork = Rows(levels, frozen(parents), mine.num_layers, mine.device, mine.limit)
        forked._start(self.model, rows_of_fork, self._modules)  # noqa: SLF001
        forked._weights = self._weights  # noqa: SLF001
        forked._begin(self._logits.of_rows(chosen), self._pending.of_rows(chosen))  # noqa: SLF001
        return forked

    @alone
    def reset(self) -> None:
        """Forget what the rows added since they were forked; a cache that was not forked forgets its rows."""
        self.rows.clear()
        if not self.rows.levels:
            self.rows.adopt(0)
        for layer in self.layers:
            layer.drop()
        self._begin(*self._origin)

    def check_weights(self) -> None:
        """Raise a ValueError if the weights changed since this cache was filled, as far as that shows.

        In-place updates show (an optimizer's step, load_state_dict), and so do new parameters. Writes by
        `.data` or numpy, buffers, hooks, optimizers with fused=True do not: call `invalidate` after those.
        A model in training mode that drops values out, or caches to checkpoint gradients, is refused too.
        """
        self._weights.check(self.model)

    def invalidate(self) -> None:
        """Say that the weights changed: neither this cache nor its forks go on."""
        self._weights.valid = False

    @alone
    def generate(self, input_ids: object = None, **options: Any) -> list[Completion]:
        """Continue every row, in place: what is generated stays in the cache, as in a chat.

        A call that fails or is interrupted hands nothing out and leaves all rows as before: they do not hold
        `input_ids` either.

        Parameters
        ----------
        input_ids : optional
            Tokens for each row to go on from, as `extend` takes them.
        **options
            Those of `hydragen.transformers.continue_rows`, which this is.

        Returns
        -------
        list of Completion
            One per row that is answered, in order.
        """
        from hydragen.transformers.generate import continue_rows  # noqa: PLC0415 - made of caches: a cycle

        check_options(options, continue_rows, "PrefixCache.generate")
        return continue_rows(self, input_ids, **options)

    def last_logits(self, rows: IntArray) -> Tensor:
        """Logits that follow the last token of `rows`, [rows, vocabulary]; ValueError where not known."""
        self._count_rows()
        return self._logits.get(rows, self.lengths)

    def decode(self, tokens: Tensor, active: Tensor) -> Tensor:
        """Run a token, int64 [rows], for each row of `Rows.begin_decode`; logits [rows, vocabulary].

        Rows that are not active, bool [rows], are not stored. Device work only.
        """
        return self._forward(tokens[:, None], self.rows.advance(active)[:, None])

    def end_decode(self, rows: IntArray, lens: IntArray, pending: IntArray) -> None:
        """Say what rows hold, and which token each of them made last and has not been fed."""
        self.rows.end_decode(rows, lens)
        self._pending = self._pending.noted(rows, pending, self.lengths)

    def _count_rows(self) -> None:
        """Know nothing of the ends of rows that a pass of the model's own has made."""
        if self._pending.tokens.size != self.num_rows:
            self._logits, self._pending = LastLogits.none(self.num_rows), Pending.none(self.num_rows)

    def _run(self, rows: IntArray, ids: Sequence[IntArray]) -> Tensor:
        """Run tokens ids[i] of rows[i] through the model; logits of the last ones, [rows, vocabulary]."""
        tokens, positions = left_padded(ids, self.lengths[rows])
        self.rows.announce(rows, np.array([x.size for x in ids], dtype=np.int64))
        with torch.no_grad():
            return self._forward(tokens.to(self.model.device), positions.to(self.model.device))

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        options = {"position_ids": positions, "past_key_values": self, "use_cache": True, **self._only_last}
        try:
            out = self.model(tokens, **options)
        finally:
            self.rows.forget_announcements()  # those of a pass that broke off before its first layer
            take_handed_over()  # or within one
        return cast("Tensor", out.logits[:, -1])

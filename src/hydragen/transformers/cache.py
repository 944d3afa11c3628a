"""PrefixCache: what sequences share is stored once, for transformers models."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hydragen.host_ints import IntArray, as_int_vector, frozen
from hydragen.transformers.layers import PrefixLayer
from hydragen.transformers.rows import Level, Rows
from hydragen.transformers.support import caches_latents, check_model, layer_windows, max_positions

# Tokens that go through the model together in a prefill: enough to fill a GPU, bounded activations.
PREFILL_TOKENS = 8192


@dataclass
class Weights:
    """What the weights were when a prefix was computed; one object for a cache and all its forks."""

    seen: tuple[tuple[int, int], ...] | None = None
    valid: bool = True

    def fit(self, model: PreTrainedModel) -> bool:
        """Whether the model's weights are still those, as far as that shows."""
        return self.valid and self.seen in (None, weights_of(model))


class PrefixCache(Cache):  # type: ignore[misc]
    """A key-value cache in which rows share the tokens they have in common.

    Row r holds a path of shared tokens, stored once and read once per step for all rows, and a tail of its
    own that grows. `prefill` runs prompts, `fork` makes rows that share what is there, and `generate` here or
    the model's own `generate(ids, past_key_values=cache)`, continues them.

    Parameters
    ----------
    model : transformers causal LM
        With attn_implementation="hydragen".

    Raises
    ------
    TypeError, ValueError
        If the model cannot work over shared prefixes; the message says why.

    Examples
    --------
    >>> prefix = PrefixCache(model).prefill(system_ids)          # doctest: +SKIP
    >>> model.generate(ids, past_key_values=prefix.fork(8), num_return_sequences=8)  # doctest: +SKIP
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._start(check_model(model), (), np.empty(0, np.int64), Weights())

    def _start(
        self, model: PreTrainedModel, levels: tuple[Level, ...], parents: IntArray, weights: Weights
    ) -> None:
        windows, latent = layer_windows(model), caches_latents(model)
        self.model = model
        self._rows = Rows(levels, parents, len(windows), model.device)
        self._weights = weights
        layers = [PrefixLayer(i, self._rows, window, latent) for i, window in enumerate(windows)]
        super().__init__(layers=layers)

    @property
    def num_rows(self) -> int:
        """Sequences that this cache continues; 0 before the first prefill."""
        return self._rows.size

    @property
    def lengths(self) -> IntArray:
        """Tokens of each row, shared ones included, int64 [num_rows]."""
        return frozen(self._rows.path_lens + self._rows.lens)

    @property
    def stored_tokens(self) -> int:
        """Tokens that are stored, each once."""
        return int(sum(level.lens.sum() for level in self._rows.levels) + self._rows.lens.sum())

    def prefill(self, input_ids: object) -> PrefixCache:
        """Run prompts through the model, so that rows begin with them.

        Parameters
        ----------
        input_ids : integers [len]; or one such per row, as a list or a tensor [num_rows, len]
            Token ids without padding. One prompt makes a cache of one row.

        Returns
        -------
        PrefixCache
            This one.

        Raises
        ------
        ValueError
            If the cache holds tokens already, or a prompt is empty or longer than the model's positions.
        """
        if self._rows.size:
            raise ValueError(
                f"prefill needs an empty cache, got one with {self._rows.size} rows; extend() adds tokens to "
                "its rows, fork() makes new rows that share them"
            )
        prompts = token_rows(input_ids, "input_ids")
        for i, ids in enumerate(prompts):
            if ids.size == 0:
                raise ValueError(
                    f"input_ids[{i}] must hold a token or more, got an empty prompt; leave it out"
                )
        self._rows.adopt(len(prompts))
        return self.extend(prompts)

    def extend(self, input_ids: object) -> PrefixCache:
        """Run more tokens through the model, appended to the rows; rows may get none.

        Parameters
        ----------
        input_ids : integers [len] for the one row there is; or one such per row
        """
        self.check_weights()
        rows = self._rows
        given = token_rows(input_ids, "input_ids")
        if len(given) != rows.size:
            raise ValueError(
                f"input_ids must hold one list of tokens per row, {rows.size}, got {len(given)}; give rows "
                "that get nothing an empty list"
            )
        counts = np.array([ids.size for ids in given], dtype=np.int64)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        limit = max_positions(self.model)
        for row, ids in enumerate(given):
            if ids.size and not 0 <= ids.min() <= ids.max() < vocabulary:
                raise ValueError(
                    f"input_ids[{row}] must be tokens of the model's vocabulary, 0 to {vocabulary - 1}, got "
                    f"{ids.min()} to {ids.max()}; use the tokenizer that belongs to the model"
                )
            if limit is not None and self.lengths[row] + ids.size > limit:
                raise ValueError(
                    f"row {row} must fit the model's {limit} positions, got {self.lengths[row] + ids.size} "
                    "tokens; shorten the prompt"
                )
        rows.reserve(counts)
        for group in _groups(counts):
            longest = int(counts[group].max())
            for begin in range(0, longest, PREFILL_TOKENS):
                live = group[counts[group] > begin]
                self._run(live, [given[row][begin : begin + PREFILL_TOKENS] for row in live])
        self._weights.seen = weights_of(self.model)
        return self

    def fork(self, n: int | Sequence[int] = 1) -> PrefixCache:
        """Make a cache whose rows share what the rows of this one hold; nothing is copied.

        Row r of this cache becomes n (or n[r]) rows, side by side. This cache stays as it is and can be
        forked again, and extended: forks do not see what is added later.

        Parameters
        ----------
        n : int, or one int per row
        """
        counts = np.full(self.num_rows, n) if isinstance(n, int) else as_int_vector(n, "n")
        if counts.size != self.num_rows or (counts < 0).any() or counts.sum() < 1:
            raise ValueError(
                f"n must be a positive int, or {self.num_rows} of them, one per row, got {n!r}; prefill a "
                "prompt before you fork it"
            )
        return self.branch(np.repeat(np.arange(self.num_rows), counts))

    def branch(self, rows: IntArray) -> PrefixCache:
        """Make a cache whose row i continues row rows[i] of this one; `fork` with any assignment."""
        self.check_weights()
        mine = self._rows
        tail = tuple(layer.kv()[-1] for layer in self.layers)
        levels = (*mine.levels, Level(mine.parents, frozen(mine.lens.copy()), tail))
        forked = PrefixCache.__new__(PrefixCache)
        forked._start(self.model, levels, frozen(np.asarray(rows, np.int64)), self._weights)  # noqa: SLF001
        return forked

    def reset(self) -> None:
        """Forget what the rows added since they were forked; the shared prefix stays.

        A cache that has not been forked forgets everything.
        """
        self._rows.clear()
        for layer in self.layers:
            layer.drop()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i continue what row beam_idx[i] was, as beam search does between steps."""
        rows = beam_idx.cpu().numpy()
        for layer in self.layers:
            layer.reorder(rows)
        self._rows.permute(rows)

    def check_weights(self) -> None:
        """Raise a ValueError if the weights changed since this cache was filled, as far as that shows.

        In-place updates show (an optimizer's step, load_state_dict); writes through `.data` do not: call
        `invalidate` after those.
        """
        if not self._weights.fit(self.model):
            raise ValueError(
                "the model's weights changed since this prefix was computed, so it no longer fits them; call "
                "prefill on a new PrefixCache"
            )

    def invalidate(self) -> None:
        """Say that the weights changed: this cache and all forks of it refuse to go on."""
        self._weights.valid = False

    @property
    def _is_user_defined(self) -> bool:
        return True

    @_is_user_defined.setter
    def _is_user_defined(self, _: bool) -> None:
        # transformers' generate marks the caches it is given when it begins: a new prompt, to be checked.
        self.check_weights()
        self._rows.fresh = True

    def _run(self, rows: IntArray, ids: Sequence[IntArray]) -> Tensor:
        """Run tokens ids[i] of rows[i] through the model; logits of the last ones, [rows, vocabulary]."""
        counts = np.array([x.size for x in ids], dtype=np.int64)
        begin = self.lengths[rows]
        tokens = np.zeros((rows.size, counts.max()), dtype=np.int64)
        positions = np.zeros_like(tokens)
        for i, x in enumerate(ids):
            tokens[i, -x.size :] = x
            positions[i, -x.size :] = begin[i] + np.arange(x.size)
        self._rows.announce(rows, counts)
        device = self.model.device
        with torch.no_grad():
            return self.forward(torch.from_numpy(tokens).to(device), torch.from_numpy(positions).to(device))

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Run the model over announced tokens [rows, len]; logits of the last ones, [rows, vocabulary]."""
        options = {"logits_to_keep": 1} if _keeps_logits(self.model) else {}
        out = self.model(tokens, position_ids=positions, past_key_values=self, use_cache=True, **options)
        logits: Tensor = out.logits[:, -1]
        return logits

    def _unsupported(self, *_: object, **__: object) -> NoReturn:
        raise NotImplementedError(
            "a PrefixCache takes no tokens back and keeps its rows: assisted, contrastive and prompt-lookup "
            "decoding cannot use it; greedy, sampling and beam search can"
        )

    crop = batch_repeat_interleave = batch_select_indices = early_initialization = _unsupported


def token_rows(input_ids: object, name: str) -> list[IntArray]:
    """Return token ids as one vector per row, from one vector, several, or a tensor [rows, len]."""
    if isinstance(input_ids, Tensor | np.ndarray):
        if input_ids.ndim == 2:
            return [as_int_vector(row, f"{name}[{i}]") for i, row in enumerate(_on_host(input_ids))]
        return [as_int_vector(_on_host(input_ids), name)]
    if isinstance(input_ids, str) or not isinstance(input_ids, Sequence):
        raise TypeError(
            f"{name} must be token ids, or a list of them per row, got {type(input_ids).__name__}; "
            "texts need a tokenizer: tokenizer(text).input_ids"
        )
    if input_ids and all(isinstance(x, int | np.integer) for x in input_ids):
        return [as_int_vector(input_ids, name)]
    return [as_int_vector(_on_host(row), f"{name}[{i}]") for i, row in enumerate(input_ids)]


def weights_of(model: PreTrainedModel) -> tuple[tuple[int, int], ...]:
    """Return addresses and version counters: they change when a parameter is replaced or written in place."""
    return tuple(
        (p.data_ptr(), -1 if p.is_inference() else p._version)  # noqa: SLF001  (torch's documented counter)
        for p in model.parameters()
    )


def _on_host(ids: Any) -> Any:
    return ids.detach().cpu() if isinstance(ids, Tensor) else ids


def _keeps_logits(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _groups(counts: IntArray) -> list[IntArray]:
    """Split rows that get tokens into groups of at most PREFILL_TOKENS tokens with padding, longest first."""
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    groups = []
    while order.size:
        size = max(1, PREFILL_TOKENS // int(counts[order[0]]))
        groups.append(np.sort(order[:size]))
        order = order[size:]
    return groups

"""The rows of a cache: what they share, how much of their own they hold, and where the next tokens go."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hydragen.host_ints import IntArray
from hydragen.transformers.arrivals import count_new_tokens
from hydragen.transformers.levels import Layout, Level, path_lens
from hydragen.transformers.plans import Plans
from hydragen.tree import PrefixTree


class Step(NamedTuple):
    """Where one forward pass writes.

    Row `source[i]` of the flattened [rows * q_len] new tokens, all of them in order if None, goes to
    `target[i]` of the tails in `layout`.
    """

    layout: Layout
    source: Tensor | None
    target: Tensor
    tree: PrefixTree
    causal: bool
    # Of the steps of a decode loop, which all have this shape
    plans: Plans | None = None


class Mark(NamedTuple):
    """What rows held at some time, as far as new tokens change it."""

    lens: IntArray
    layout: Layout | None
    waiting: int
    fresh: bool


class Rows:
    """Structure and lengths of a cache's rows, the same for every layer of the model.

    Row r's tokens are the path of levels down to node `parents[r]` of the last level, and then its own tail
    of `lens[r]` tokens. Lengths live on the host, where they are checked, and on the device, where attention
    reads them.
    """

    def __init__(
        self,
        levels: tuple[Level, ...],
        parents: IntArray,
        num_layers: int,
        device: torch.device,
        limit: int | None = None,
    ) -> None:
        self.levels, self.parents, self.num_layers, self.device = levels, parents, num_layers, device
        # Beyond so many positions what is stored would be another's (`support.stored_positions`).
        self.limit = limit
        # `permute` changes the parents; `clear` brings them back.
        self.first_parents = parents
        self.path_lens = path_lens(levels, parents)
        self.lens = np.zeros(parents.size, dtype=np.int64)
        self.lens_before = self.lens
        self.lens_on_device = torch.zeros(parents.size, dtype=torch.int32, device=device)
        self.reserved = np.zeros(parents.size, dtype=np.int64)
        self.layout: Layout | None = None
        # Forward passes so far, and layers that have not stored the last one's tokens yet
        self.steps = self.waiting = 0
        self.step: Step
        # The next forward pass is the first of a prompt: positions are compared once.
        self.fresh = True
        # Rows and token counts of the next forward pass, when the caller of the model knows them.
        self.announced: tuple[IntArray, IntArray] | None = None
        # `advance` has worked out the next step.
        self.prepared = False
        self._trees: dict[bytes, PrefixTree] = {}

    @classmethod
    def none(cls, num_layers: int, device: torch.device, limit: int | None = None) -> Rows:
        """No rows yet."""
        return cls((), np.empty(0, dtype=np.int64), num_layers, device, limit)

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.parents.size

    def adopt(self, num_rows: int) -> None:
        """Become that many rows that share nothing; only a cache without rows can."""
        self.first_parents = np.full(num_rows, -1)
        self.clear()

    def reserve(self, counts: IntArray) -> None:
        """Say how many more tokens each row will get, so that there is room for exactly these."""
        self.reserved = self.lens + counts

    def announce(self, rows: IntArray, counts: IntArray) -> None:
        """Say what the next forward pass brings: counts[i] tokens, at the right end, for row rows[i]."""
        self.announced, self.prepared = (rows, counts), False

    def begin_step(self, num_rows: int, q_len: int, position_ids: Tensor | None, mask: Tensor | None) -> None:
        """Work out where a forward pass's tokens go, and count them; the first layer calls this."""
        self.check_whole()
        if not self.prepared:
            self._place(num_rows, q_len, position_ids, mask)
        self.prepared = False
        self.steps, self.waiting = self.steps + 1, self.num_layers

    def mark(self) -> Mark:
        """Return what `go_back` comes back to."""
        return Mark(self.lens, self.layout, self.waiting, self.fresh)

    def go_back(self, mark: Mark) -> None:
        """Forget the tokens that came since `mark`, also those of a pass that broke off.

        Tokens from before are where each layer has them. Room that did not fit into memory is not asked for
        again.
        """
        self.lens, self.layout, self.waiting, self.fresh = mark
        self.lens_on_device = torch.from_numpy(self.lens.astype(np.int32)).to(self.device)
        self.forget_announcements()

    def check_whole(self) -> None:
        """Raise a RuntimeError if some layers hold tokens that others do not."""
        if self.waiting:
            raise RuntimeError(
                "a forward pass over this cache broke off halfway, so its layers hold different tokens; call "
                "cache.reset() and feed the rows again (the shared prefix is intact)"
            )

    def check_order(self, rows: IntArray) -> None:
        """Raise a ValueError unless row i can take over what row rows[i] holds, where it is."""
        if rows.size != self.size or (rows.size and not 0 <= rows.min() <= rows.max() < self.size):
            raise ValueError(
                f"beam_idx must hold a row of the cache, 0 to {self.size - 1}, for each of its {self.size} "
                f"rows, got {rows.tolist()}; use cache.branch(rows) for other rows or more of them"
            )
        if self.layout is not None and (self.lens[rows] > self.layout.capacity).any():
            row = int((self.lens[rows] > self.layout.capacity).argmax())
            raise ValueError(
                f"beam_idx must not give row {row}, with room for {self.layout.capacity[row]} tokens of its "
                f"own, the {self.lens[rows[row]]} of row {rows[row]}; use cache.branch(rows)"
            )

    def _check_limit(self, ends: IntArray) -> None:
        """Raise a ValueError if a row ends where the model would have turned what is stored otherwise."""
        if self.limit is not None and ends.size and ends.max() > self.limit:
            raise ValueError(
                f"rows must end within {self.limit} positions, got {ends.max()}: beyond, this model's rotary "
                "embedding turns earlier tokens otherwise than they are stored (rope_type longrope or "
                "dynamic); shorten the prompts, or use the model's own generate without a PrefixCache"
            )

    def _place(self, num_rows: int, q_len: int, position_ids: Tensor | None, mask: Tensor | None) -> None:
        """Find a place for every new token, and count them."""
        if self.announced is not None:
            rows, counts = self.announced
            self.announced = None
        else:
            if self.size == 0:
                self.adopt(num_rows)
            if num_rows != self.size:
                raise ValueError(
                    f"the cache must have a row per sequence of the batch, {num_rows}, got {self.size}; "
                    "fork it into prompts x max(num_beams, num_return_sequences) rows: cache.fork(n)"
                )
            begin = self.path_lens + self.lens
            counts = count_new_tokens(begin, q_len, position_ids, mask, first=self.fresh)
            rows = np.arange(self.size)
        before = self.lens
        after = before.copy()
        after[rows] += counts
        self._check_limit(self.path_lens + after)
        layout = self._room(after)
        rank = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        target = np.repeat((layout.starts + before)[rows], counts) + rank
        source = None
        if not (counts == q_len).all():
            source = np.repeat(np.arange(1, rows.size + 1) * q_len - counts, counts) + rank
        self.step = Step(
            layout,
            None if source is None else torch.from_numpy(source).to(self.device),
            torch.from_numpy(target).to(self.device),
            self._tree(rows),
            q_len > 1,
        )
        self.lens_before, self.lens = before, after
        self.lens_on_device = torch.from_numpy(after.astype(np.int32)).to(self.device)
        self.layout, self.fresh = layout, False

    def begin_decode(self, rows: IntArray, room: IntArray) -> None:
        """Get ready for steps of one token for `rows`, at most room[i] of them for rows[i].

        From here on lengths grow on the device alone, by `advance`; `end_decode` brings them back.
        """
        self._check_limit((self.path_lens + self.lens)[rows] + room)
        # One place more: rows that are done go on being computed until they are dropped, and write there.
        layout = self._room(self.lens + _scattered(self.size, rows, room + 1))
        # as the host has them: a loop that was interrupted has counted on the device alone
        self.lens_on_device = torch.from_numpy(self.lens.astype(np.int32)).to(self.device)
        self.slots = torch.from_numpy(rows).to(self.device)
        self.first_target = torch.from_numpy(layout.starts[rows]).to(self.device)
        self.first_position = torch.from_numpy(self.path_lens[rows]).to(self.device)
        self.step = Step(layout, None, torch.empty_like(self.slots), self._tree(rows), False, Plans())
        self.lens_before, self.layout, self.fresh = self.lens, layout, False

    def advance(self, active: Tensor) -> Tensor:
        """Count one more token for the active rows, bool [rows]; positions of all rows' tokens, int64 [rows].

        On the device only, on tensors that stay: a captured step does this too.
        """
        lens = self.lens_on_device[self.slots]
        self.step.target.copy_(self.first_target + lens)
        self.lens_on_device.index_add_(0, self.slots, active.to(torch.int32))
        self.step.plans.update()  # type: ignore[union-attr]  # decode steps have made them
        self.prepared = True
        return self.first_position + lens

    def forget_announcements(self) -> None:
        """Forget what was said of the next forward pass."""
        self.prepared, self.announced = False, None

    def forget_step(self) -> None:
        """Undo the notes of a step that was never run."""
        self.prepared, self.waiting = False, 0

    def end_decode(self, rows: IntArray, lens: IntArray) -> None:
        """Say how long rows have become."""
        self.lens = self.lens.copy()
        self.lens[rows] = lens

    def _room(self, needed: IntArray) -> Layout:
        """Return a layout that holds `needed` tokens per row: the one there is, if it does."""
        old = self.layout
        if old is not None and (needed <= old.capacity).all():
            return old
        if old is None:
            # What is asked for, exactly, and room to decode without moving at once
            exact = self.reserved.size == needed.size and (self.reserved >= needed).all()
            return Layout.of(self.reserved if exact else np.full(self.size, max(16, needed.max())))
        return Layout.of(np.full(self.size, max(needed.max(), 2 * old.capacity.max())))

    def _tree(self, rows: IntArray) -> PrefixTree:
        """Return the tree of shared nodes and tails, row i of the batch ending at the tail of rows[i]."""
        key = rows.tobytes()
        if key not in self._trees:
            levels = [*(level.parents for level in self.levels), self.parents]
            first = np.cumsum([0, *(parents.size for parents in levels)])
            parents = [np.where(p < 0, -1, p + first[max(i - 1, 0)]) for i, p in enumerate(levels)]
            self._trees[key] = PrefixTree.from_parents(np.concatenate(parents), row_to_node=first[-2] + rows)
        return self._trees[key]

    def kv_lens(self) -> list[IntArray | Tensor]:
        """Lengths of all nodes, level by level, as `hydragen.attention` takes them."""
        return [*(level.lens for level in self.levels), self.lens_on_device]

    def permute(self, rows: IntArray) -> None:
        """Let row i continue what row rows[i] was."""
        self.parents, self.path_lens = self.parents[rows], self.path_lens[rows]
        self.lens = self.lens[rows]
        self.lens_on_device = torch.from_numpy(self.lens.astype(np.int32)).to(self.device)
        self._trees = {}

    def clear(self) -> None:
        """Forget the tails."""
        self.parents = self.first_parents
        self.path_lens, self._trees = path_lens(self.levels, self.parents), {}
        self.lens = np.zeros(self.size, dtype=np.int64)
        self.lens_on_device = torch.zeros(self.size, dtype=torch.int32, device=self.device)
        self.layout, self.fresh, self.announced, self.prepared = None, True, None, False
        self.waiting = 0


def _scattered(size: int, rows: IntArray, values: IntArray) -> IntArray:
    """Zeros [size] with `values` at `rows`."""
    out = np.zeros(size, dtype=np.int64)
    out[rows] = values
    return out

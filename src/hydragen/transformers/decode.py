"""The decode loop: one step is the same code on a CPU, where it runs as it stands, and on a GPU, captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hydragen.host_ints import IntArray
from hydragen.transformers.sampling import Sampling

if TYPE_CHECKING:
    from hydragen.transformers.cache import PrefixCache

# Steps between looks at which rows have finished; each look waits for the device.
LOOK_EVERY = {"cpu": 1, "cuda": 16}
# Rows are dropped when at most this share of them still runs: on a GPU each change is a new graph.
KEEP_ABOVE = {"cpu": 0.999, "cuda": 0.75}


class Finished(NamedTuple):
    """One sequence that is done: its place in the batch, its new tokens, and why it ended."""

    index: int
    token_ids: list[int]
    logprobs: list[float]
    reason: str


@dataclass
class State:
    """What changes from step to step, on the device, a row per sequence still computed.

    Attributes
    ----------
    token : int64 [rows]
        The token to be fed next.
    active : bool [rows]
        Whether the row goes on; the others are computed until they are dropped, and count for nothing.
    made, limit, seed : int64 [rows]
        New tokens so far, at most, and the seed.
    tokens, logprobs : [rows, max_new_tokens]
    """

    token: Tensor
    active: Tensor
    made: Tensor
    limit: Tensor
    seed: Tensor
    tokens: Tensor
    logprobs: Tensor

    @classmethod
    def begin(cls, limits: IntArray, seeds: IntArray, device: torch.device) -> State:
        """No tokens yet."""
        size, longest = limits.size, int(limits.max())
        zeros = torch.zeros(size, dtype=torch.int64, device=device)
        return cls(
            token=zeros,
            active=torch.ones(size, dtype=torch.bool, device=device),
            made=zeros.clone(),
            limit=torch.from_numpy(limits).to(device),
            seed=torch.from_numpy(seeds).to(device),
            tokens=torch.zeros(size, longest, dtype=torch.int64, device=device),
            logprobs=torch.zeros(size, longest, dtype=torch.float32, device=device),
        )

    def accept(self, logits: Tensor, sampling: Sampling, stop: Tensor) -> None:
        """Choose the next tokens and note them, in place: a captured step reads and writes these tensors."""
        chosen, logprob = sampling.choose(logits, self.seed, self.made)
        place = self.made.clamp(max=self.tokens.shape[1] - 1)[:, None]
        for noted, new in ((self.tokens, chosen), (self.logprobs, logprob)):
            old = noted.gather(1, place)[:, 0]
            noted.scatter_(1, place, torch.where(self.active, new, old)[:, None])
        self.token.copy_(torch.where(self.active, chosen, self.token))
        self.made.add_(self.active)
        stopped = torch.isin(chosen, stop) | (self.made >= self.limit)
        self.active.logical_and_(~stopped)

    def select(self, rows: Tensor) -> State:
        """Return the state of some rows."""
        return State(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def decode(
    cache: PrefixCache,
    limits: IntArray,
    seeds: IntArray,
    sampling: Sampling,
    stop_token_ids: Sequence[int],
    on_step: Callable[[int], object] = lambda _: None,
) -> Iterator[Finished]:
    """Continue every row of `cache` until its limit or a stop token; yield rows as they finish.

    Parameters
    ----------
    cache : PrefixCache
        Its rows' last logits are known: they have been prefilled, or forked from rows that were.
    limits : int64 [rows]
        The most new tokens of each row, at least 1.
    seeds : int64 [rows]
    on_step : callable
        Hears of tokens made, now and then.
    """
    device = cache.model.device
    stop = torch.tensor(list(stop_token_ids), dtype=torch.int64, device=device)
    rows = np.arange(cache.num_rows)
    with torch.no_grad():
        state = State.begin(limits, seeds, device)
        state.accept(cache.last_logits(), sampling, stop)
        told = 0
        while True:
            made, active = state.made.cpu().numpy(), state.active.cpu().numpy()
            on_step(int(made.sum()) - told)
            done = np.flatnonzero(~active)
            yield from _finished(state, done, rows, stop_token_ids)
            cache.note_made(rows[done], made[done], state.token[torch.from_numpy(done).to(device)])
            told = int(made[active].sum())
            if done.size == rows.size:
                return
            left = np.flatnonzero(active)
            kept = left if left.size <= rows.size * KEEP_ABOVE[device.type] else None
            ...

"""The decode loop: one step is the same code on a CPU, where it runs as it stands, and on a GPU, captured."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from hydragen.host_ints import IntArray
from hydragen.transformers.experts import batched_experts, batched_pays
from hydragen.transformers.parallel import is_parallel
from hydragen.transformers.sampling import Sampling, logprobs_of

if TYPE_CHECKING:
    from hydragen.transformers.cache import PrefixCache

# On a GPU, steps between looks at which rows have finished: each look waits for the device.
LOOK_EVERY = 16
# On a GPU, rows are dropped when at most this share of them still runs: each change is a new graph.
# Elsewhere each step is looked at, and finished rows are dropped at once.
KEEP_ABOVE = 0.75


class Finished(NamedTuple):
    """One sequence that is done: its place in the batch, its new tokens, and why it ended.

    `logprobs` is empty where nobody asked for them.
    """

    row: int
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
    broken : bool [rows]
        Whether the model's logits for the row were no numbers, so that it ended.
    made, limit, seed : int64 [rows]
        New tokens so far, at most, and the seed.
    tokens : int64 [rows, max_new_tokens]
    logprobs : float32 [rows, max_new_tokens, or 0 if nobody asks for them]
    """

    token: Tensor
    active: Tensor
    broken: Tensor
    made: Tensor
    limit: Tensor
    seed: Tensor
    tokens: Tensor
    logprobs: Tensor

    @classmethod
    def begin(cls, limits: IntArray, seeds: IntArray, device: torch.device, logprobs: bool = False) -> State:
        """No tokens yet."""
        size, longest = limits.size, int(limits.max())
        zeros = torch.zeros(size, dtype=torch.int64, device=device)
        return cls(
            token=zeros,
            active=torch.ones(size, dtype=torch.bool, device=device),
            broken=torch.zeros(size, dtype=torch.bool, device=device),
            made=zeros.clone(),
            limit=torch.from_numpy(limits).to(device),
            seed=torch.from_numpy(seeds).to(device),
            tokens=torch.zeros(size, longest, dtype=torch.int64, device=device),
            logprobs=torch.zeros(size, longest if logprobs else 0, device=device, dtype=torch.float32),
        )

    @torch.no_grad()
    def accept(self, logits: Tensor, sampling: Sampling, stop: Tensor) -> None:
        """Choose the next tokens and note them, in place: a captured step reads and writes these tensors."""
        chosen = sampling.choose(logits, self.seed, self.made)
        self.broken.logical_or_(self.active & (chosen < 0))
        self.active.logical_and_(~self.broken)
        chosen = chosen.clamp(min=0)
        place = self.made.clamp(max=self.tokens.shape[1] - 1)[:, None]
        notes = [(self.tokens, chosen)]
        if self.logprobs.shape[1]:
            notes.append((self.logprobs, logprobs_of(logits, chosen)))
        for noted, new in notes:
            old = noted.gather(1, place)[:, 0]
            noted.scatter_(1, place, torch.where(self.active, new, old)[:, None])
        self.token.copy_(torch.where(self.active, chosen, self.token))
        self.made.add_(self.active)
        stopped = (chosen[:, None] == stop).any(1) | (self.made >= self.limit)
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
    logprobs: bool = False,
) -> Iterator[Finished]:
    """Continue the rows of `cache` until its limit or a stop token; yield rows as they finish.

    Parameters
    ----------
    cache : PrefixCache
        Its rows' last logits are known: they have been prefilled, or forked from rows that were.
    limits : int64 [rows]
        The most new tokens of each row; rows with 0 are left alone.
    seeds : int64 [rows]
    logprobs : bool
        Whether to note them.
    """
    device, start = cache.model.device, cache.lengths - cache.rows.path_lens
    stop = torch.tensor(list(stop_token_ids), dtype=torch.int64, device=device)
    look_every = LOOK_EVERY if device.type == "cuda" else 1
    rows = np.flatnonzero(limits)
    reported = np.zeros(rows.size, dtype=bool)
    state = State.begin(limits[rows], seeds[rows], device, logprobs)
    state.accept(cache.last_logits(rows), sampling, stop)
    step: Step | None = None
    while True:
        made, active = state.made.cpu().numpy(), state.active.cpu().numpy()
        # The token a row made last has not been fed.
        cache.end_decode(rows, start[rows] + made - 1, state.token.cpu().numpy())
        broken = state.broken.cpu().numpy()
        yield from _finished(state, np.flatnonzero(~active & ~reported & ~broken), rows, stop_token_ids)
        if broken.any():
            _refuse(cache, int(rows[broken][0]), int(made[broken][0]))
        reported |= ~active
        if reported.all():
            return
        if step is None or active.sum() <= (KEEP_ABOVE if device.type == "cuda" else 0.999) * rows.size:
            left = np.flatnonzero(active)
            state = state.select(torch.from_numpy(left).to(device))
            rows, made, reported = rows[left], made[left], np.zeros(left.size, dtype=bool)
            cache.rows.begin_decode(rows, limits[rows] - made)
            step = Step(cache, state, sampling, stop)
            active = np.ones(left.size, dtype=bool)
        for _ in range(min(look_every, int((limits[rows] - made)[active].max()))):
            step.run()


class Step:
    """One decode step: feed each row's token, choose the next.

    On a GPU the first run is eager and warms up, the second is captured as a CUDA graph, and from then on the
    graph is replayed: it works on the cache's and the state's own tensors, which stay where they are.
    """

    def __init__(self, cache: PrefixCache, state: State, sampling: Sampling, stop: Tensor) -> None:
        self.cache, self.state, self.sampling, self.stop = cache, state, sampling, stop
        self.batched_experts = batched_pays(cache.model, state.token.numel())
        self.runs = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def run(self) -> None:
        """Do one step."""
        self.runs += 1
        if self.runs == 2 and self.state.token.is_cuda:
            self._capture()
        if self.graph is not None:
            self.graph.replay()
        else:
            self._eager()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # a communicator's own thread goes on meanwhile
            mode = "thread_local" if is_parallel(self.cache.model) else "global"
            with torch.cuda.graph(graph, capture_error_mode=mode):
                self._eager()
        except RuntimeError as error:
            # Nothing of the step has run: only the notes of which layers have stored it are wrong.
            self.cache.rows.forget_step()
            warnings.warn(
                f"{type(self.cache.model).__name__} cannot be captured in a CUDA graph, so the host takes "
                f"part in every decode step: {error}",
                UserWarning,
                stacklevel=2,
            )
        else:
            self.graph = graph

    def _eager(self) -> None:
        with batched_experts(self.cache.model, self.batched_experts):
            logits = self.cache.decode(self.state.token, self.state.active)
        self.state.accept(logits, self.sampling, self.stop)


def _refuse(cache: PrefixCache, row: int, made: int) -> NoReturn:
    raise ValueError(
        f"the logits of {type(cache.model).__name__} must be numbers, got NaN (or infinities to draw from) "
        f"for row {row} after {made} new tokens; look for weights that are NaN, and for float16 that "
        "overflows: bfloat16 does not"
    )


def _finished(
    state: State, done: IntArray, rows: IntArray, stop_token_ids: Sequence[int]
) -> Iterator[Finished]:
    """Read what rows `done` of the state have made."""
    if done.size == 0:
        return
    of = state.select(torch.from_numpy(done).to(state.token.device))
    for i, made in enumerate(of.made.tolist()):
        tokens = of.tokens[i, :made].tolist()
        reason = "stop" if tokens[-1] in stop_token_ids else "length"
        yield Finished(int(rows[done[i]]), tokens, of.logprobs[i, :made].tolist(), reason)

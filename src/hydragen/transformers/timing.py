"""How long a decode step takes, and the least it could take: for the benchmark."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from hydragen.explain import explain
from hydragen.transformers.cache import PrefixCache
from hydragen.transformers.decode import State, Step
from hydragen.transformers.parallel import processes, smallest
from hydragen.transformers.sampling import Sampling
from hydragen.transformers.support import text_config
from hydragen.tree import PrefixTree

# Equal parts of a completion in whose middle steps are timed: a step's time is a line in the length of the
# rows' own tokens, and the mean of a line over a part is its value in the middle.
PARTS = 4
MOST_REPLAYS = 7


@dataclass(frozen=True)
class StepTime:
    """The time of a decode step.

    Attributes
    ----------
    seconds : float
        Mean over the steps of a completion.
    lengths : tuple of int
        Tokens of its own that each row attended to where steps were timed.
    at : tuple of float
        Seconds there, each the median of `replays` steps in a row.
    replays : int
    host_seconds : float
        What the host needs to start a step; the device waits for it where this is more than a step takes.
    graph : bool
        Whether steps were replays of a CUDA graph.
    """

    seconds: float
    lengths: tuple[int, ...]
    at: tuple[float, ...]
    replays: int
    host_seconds: float
    graph: bool


@torch.no_grad()
def time_step(cache: PrefixCache, completion: int, seconds: float) -> StepTime:
    """Time a greedy decode step of all rows of a fresh fork: the model, the new keys, the choice of tokens.

    The loop of `generate` looks at the tokens every few steps; that is not part of it. The rows' own keys and
    values are random, since the tokens before were not generated. Ways that are timed one after another on
    one cache share its memory.

    Parameters
    ----------
    cache : PrefixCache
        Whose rows hold no tokens of their own.
    completion : int
        New tokens per row: the first comes of the prefill, the others of completion - 1 steps.
    seconds : float
        About how long to measure; at least one step is timed.
    """
    rows, device, size = cache.rows, cache.model.device, cache.num_rows
    steps = completion - 1
    none = torch.empty(0, dtype=torch.int64, device=device)
    state = State.begin(np.full(size, completion), np.arange(size), device)
    state.limit.fill_(2**62)  # all rows go on
    vocabulary = cache.model.get_input_embeddings().num_embeddings
    tokens = np.random.default_rng(0).integers(0, vocabulary, size)  # the same in all processes
    state.token.copy_(torch.from_numpy(tokens))
    rows.begin_decode(np.arange(size), np.full(size, steps))
    rows.lens_on_device.zero_()
    step = Step(cache, state, Sampling(), none)
    step.run()  # compiles and plans
    for layer in cache.layers:
        for tail in (layer.keys, layer.values):
            tail.normal_()
    step.run()  # on a GPU the one that is captured
    middle = _replay(step, steps // 2, 1)
    parts = min(PARTS, steps)
    replays = smallest(cache.model, int(seconds / middle[0][0] / parts))
    if replays == 0:
        lengths, runs = [steps // 2 + 1], [middle]
    else:
        replays = min(replays, MOST_REPLAYS, -(-steps // parts))
        # The middle of each part, and of the steps timed in it; the first step attends to one token
        centres = [(i + 0.5) * steps / parts + 0.5 for i in range(parts)]
        begins = [int(min(max(round(c) - 1 - replays // 2, 0), completion - replays)) for c in centres]
        lengths = [begin + 1 + replays // 2 for begin in begins]
        runs = [_replay(step, begin, replays) for begin in begins]
    at = tuple(median(times) for times, _ in runs)
    host = median(host for _, host in runs)
    return StepTime(fmean(at), tuple(lengths), at, max(replays, 1), host, step.graph is not None)


def _replay(step: Step, begin: int, times: int) -> tuple[list[float], float]:
    """Seconds of `times` steps from tails of `begin` tokens on, and the host's part of a step."""
    step.cache.rows.lens_on_device.fill_(begin)
    clock, stamps = time.perf_counter, []
    if not step.state.token.is_cuda:
        for _ in range(times):
            stamps.append(clock())
            step.run()
        stamps.append(clock())
        seconds = [end - start for start, end in pairwise(stamps)]
        return seconds, fmean(seconds)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    torch.cuda.synchronize(step.state.token.device)
    events[0].record()
    began = clock()
    for event in events[1:]:
        step.run()
        event.record()
    host = (clock() - began) / times
    events[-1].synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)], host


def roof_seconds(cache: PrefixCache, lengths: tuple[int, ...]) -> float | None:
    """Least time of a step's attention in all layers, its arithmetic and memory traffic overlapping.

    The mean over rows' own tokens of each of `lengths`; None on a CPU, whose roof is not known.
    """
    if cache.model.device.type != "cuda":
        return None
    rows, config = cache.rows, text_config(cache.model)
    num_q_heads = config.num_attention_heads // processes(cache.model)
    shared = np.concatenate([level.lens for level in rows.levels])
    shapes: dict[tuple[Any, ...], int] = {}
    for layer in cache.layers:
        key = layer.keys.shape[-2:], layer.values.shape[-1], layer.keys.dtype
        shapes[key] = shapes.get(key, 0) + 1
    total = 0.0
    for length in lengths:
        tree = PrefixTree.from_parents(
            rows.step.tree.parents,
            kv_lens=np.append(shared, np.full(rows.size, length)),
            row_to_node=rows.step.tree.row_to_node,
        )
        for ((num_kv_heads, head_dim), head_dim_v, dtype), count in shapes.items():
            total += count * (
                explain(
                    tree,
                    num_q_heads=num_q_heads,
                    num_kv_heads=num_kv_heads,
                    head_dim=head_dim,
                    head_dim_v=head_dim_v,
                    dtype=dtype,
                    device=cache.model.device,
                ).seconds
            )
    return total / len(lengths)


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that `run` takes, device work included, and what it returns."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    began = time.perf_counter()
    out = run()
    wait()
    return time.perf_counter() - began, out

"""The demo's yardsticks: ordinary attention in time, and dense float64 attention in exactness."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hydragen.demo.workload import Batch

# Ordinary attention, q [rows, Hq, 1, D], k, v [rows, Hkv, len, D] -> [rows, Hq, 1, D]
Sdpa = Callable[[Tensor, Tensor, Tensor], Tensor]
# Tokens that are widened to float64 together.
PIECE = 8192


def sdpa_option(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ordinary attention by PyTorch's own option for grouped heads, [rows, Hq, 1, D]."""
    return scaled_dot_product_attention(q, k, v, enable_gqa=True)


def sdpa_folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with each group's query heads folded into the query axis, which a single query allows."""
    rows, num_kv_heads = k.shape[:2]
    return scaled_dot_product_attention(q.reshape(rows, num_kv_heads, -1, q.shape[-1]), k, v).reshape(q.shape)


def dense_float64(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, float]:
    """Softmax attention of one query in float64, q [Hq, D], k, v [Hkv, len, D].

    Also says to how many tokens a head attends: exp of the mean entropy of the weights.
    """
    query = q.double().view(len(k), -1, q.shape[-1])  # [Hkv, group, D]
    # Widened piece by piece: a float64 copy of a whole chapter would cost more time than the arithmetic.
    logits = torch.cat([query @ piece.double().transpose(1, 2) for piece in k.split(PIECE, dim=1)], dim=-1)
    weights = torch.softmax(logits / math.sqrt(q.shape[-1]), dim=-1)  # [Hkv, group, len]
    pieces = zip(weights.split(PIECE, dim=-1), v.split(PIECE, dim=1), strict=True)
    out = torch.stack([weight @ piece.double() for weight, piece in pieces]).sum(0)
    entropy = -torch.xlogy(weights, weights).sum(-1).mean().item()
    return out.view(q.shape), math.exp(entropy)


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Shortest time of `run`, after one run that does not count: whatever else the machine does only adds."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


# Ways to write ordinary attention for grouped heads, by the name the demo prints.
WAYS: dict[str, Sdpa] = {"enable_gqa=True": sdpa_option, "heads of a group folded by hand": sdpa_folded}


def ways_fastest_first(batch: Batch) -> list[str]:
    """Order the ways to write ordinary attention by their speed here; the demo compares with the fastest."""
    _, q, k, v = next(batch.unshared_parts())
    return sorted(WAYS, key=lambda way: seconds(partial(WAYS[way], q, k, v), q.device))


def time_with_sharing(batch: Batch) -> float:
    """Seconds of `hydragen.attention` over the tree."""
    return seconds(batch.shared, batch.q.device, repeats=5)


def time_without_sharing(batch: Batch, sdpa: Sdpa, advance: Callable[[int], object]) -> float:
    """Seconds of `sdpa` over every row's own KV, not counting the copy; `advance` hears of rows done."""
    total = 0.0
    for rows, q, k, v in batch.unshared_parts():
        total += seconds(partial(sdpa, q, k, v), q.device)
        advance(len(rows))
    return total


@dataclass(frozen=True)
class Exactness:
    """Largest distance from float64 attention over all rows, heads and components."""

    shared: float
    unshared: float
    # To how many tokens a head attends: exp of the mean entropy of its weights.
    tokens_attended: float


def measure_exactness(batch: Batch, sdpa: Sdpa, advance: Callable[[int], object]) -> Exactness:
    """Compare both ways with dense float64 attention on the same rounded inputs."""
    shared = batch.shared()[:, 0]  # [num_rows, Hq, D]
    shared_error = unshared_error = 0.0
    spread = []
    for rows, q, k, v in batch.unshared_parts():
        unshared = sdpa(q, k, v)[:, :, 0]
        for i, row in enumerate(rows):
            exact, tokens = dense_float64(q[i, :, 0], k[i], v[i])
            shared_error = max(shared_error, (shared[row] - exact).abs().max().item())
            unshared_error = max(unshared_error, (unshared[i] - exact).abs().max().item())
            spread.append(tokens)
            advance(1)
    return Exactness(shared_error, unshared_error, statistics.median(spread))

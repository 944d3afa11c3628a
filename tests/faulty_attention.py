"""Tree attention with one mistake at choice, written like a kernel: tiles, online softmax, partials, a merge.

`BUGS` names the mistakes: those that shipped in such kernels and those that are easy to make. Without a
mistake it is correct, and the judge must say so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from faulty_bugs import BUGS
from torch import Tensor

from hydragen.testing import Inputs, Problem
from hydragen.testing.pages import Pages

TILE = 16
FINITE_INFINITY = -5e4
LOG2_E = math.log2(math.e)


@dataclass
class State:
    out: Tensor  # [q_len, num_q_heads, head_dim_v]
    lse: Tensor  # [q_len, num_q_heads]


def attention(problem: Problem, inputs: Inputs, bug: str | None = None) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of all rows, with the named mistake."""
    if bug is not None and bug not in BUGS:
        raise ValueError(f"bug must be one of {', '.join(BUGS)}, got {bug!r}")
    if bug == "strides ignored":
        q, k, v = (
            x.as_strided(x.shape, torch.empty(x.shape).stride()) if fits(x) else x
            for x in (inputs.q, inputs.k, inputs.v)
        )
    elif inputs.pages is not None:
        q = inputs.q
        k, v = (
            gather(problem, inputs.pages, cache, bug)
            for cache in (inputs.pages.k_cache, inputs.pages.v_cache)
        )
    else:
        q, k, v = inputs.q, inputs.k, inputs.v
    k_starts = inputs.cu_seqlens_k.tolist()
    results: list[State] = []
    for row, row_q in enumerate(q.split(list(problem.q_lens))):
        path = list(problem.path(row))
        if bug == "only one root":
            path[0] = 0
        elif bug == "first prefix for everybody" and 0 not in path:
            path.insert(0, 0)
        elif bug == "prefix counted twice" and len(path) > 1:
            path.insert(0, path[0])
        elif bug == "merge drops the last segment" and len(path) > 1:
            path.pop()
        states = []
        seen = 0
        path_len = sum(problem.kv_lens[node] for node in path)
        for place, node in enumerate(path):
            segment = Segment(
                problem,
                row_q,
                k,
                v,
                k_starts[node],
                problem.kv_lens[node],
                seen,
                path_len,
                place == len(path) - 1,
            )
            states.append(segment.attend(bug))
            seen += problem.kv_lens[node]
        results.append(merge(problem, states, inputs.sinks, path_len, bug))
    results = misplaced(problem, results, bug)
    out = torch.cat([state.out for state in results]).to(problem.dtype)
    lse = torch.cat([state.lse for state in results])
    return out, lse * LOG2_E if bug == "returned lse in base 2" else lse


def gather(problem: Problem, pages: Pages, cache: Tensor, bug: str | None) -> Tensor:
    """Keys or values node after node, out of the pages."""
    indptr, parts = pages.page_indptr.tolist(), []
    for node, kv_len in enumerate(problem.kv_lens):
        begin, end = indptr[node], indptr[node + 1]
        if bug == "pages from one before" and begin > 0:
            begin, end = begin - 1, end - 1
        indices = pages.page_indices[begin:end].long()
        if bug == "page table ignored":
            indices = torch.arange(begin, end)
        token = torch.arange(kv_len)
        size = 16 if bug == "page size of 16 assumed" else pages.page_size
        within = (token % size).clamp(max=pages.page_size - 1)
        parts.append(cache[indices[token // size], within] if kv_len else cache[:0, 0])
    return torch.cat(parts)


def fits(tensor: Tensor) -> bool:
    """Whether the memory behind a tensor has room for it without its strides."""
    room = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    return room >= tensor.numel()


@dataclass
class Segment:
    problem: Problem
    q: Tensor  # [q_len, num_q_heads, head_dim]
    k: Tensor  # [total_kv, num_kv_heads, head_dim]
    v: Tensor
    start: int
    length: int
    seen: int  # tokens of the path before this segment
    path_len: int
    is_last: bool

    def attend(self, bug: str | None) -> State:
        """Online softmax over tiles of TILE tokens."""
        problem = self.problem
        wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
        q_len, num_q_heads, _ = self.q.shape
        shape = (num_q_heads, q_len)
        lowest = FINITE_INFINITY if bug == "finite infinity in the running max" else -math.inf
        running_max = torch.full(shape, lowest, dtype=wide)
        running_sum = torch.zeros(shape, dtype=wide)
        acc = torch.zeros(*shape, problem.head_dim_v, dtype=wide)
        tiles = self.length // TILE if bug == "tile remainder dropped" else -(-self.length // TILE)
        for tile in range(tiles):
            logits, values = self.tile(tile * TILE, wide, bug)
            if bug == "no maximum subtracted":
                new_max = torch.zeros_like(running_max)
            else:
                new_max = torch.maximum(running_max, logits.amax(-1))
            guarded = (
                new_max if bug == "unguarded -inf - -inf" else new_max.masked_fill(new_max == -math.inf, 0)
            )
            weights = torch.exp(logits - guarded[..., None])
            rescale = torch.exp(running_max - guarded)
            if bug == "running sum not rescaled" and tile:
                rescale = torch.ones_like(rescale)
            running_sum = running_sum * rescale + weights.sum(-1)
            acc = acc * rescale[..., None] + weights.to(problem.dtype).to(wide) @ values
            running_max = new_max
        empty = running_sum == 0
        lse = (running_max + running_sum.masked_fill(empty, 1).log()).masked_fill(empty, lse_of_nothing(bug))
        out = acc / running_sum.masked_fill(empty, 1)[..., None]
        if bug == "segment lse in base 2":
            lse = lse * LOG2_E
        if bug == "partials in half precision":
            out = out.bfloat16().to(wide)
        return State(out.transpose(0, 1), lse.transpose(0, 1))

    def tile(self, begin: int, wide: torch.dtype, bug: str | None) -> tuple[Tensor, Tensor]:
        """Logits ``[num_q_heads, q_len, TILE]``, values ``[num_q_heads, TILE, head_dim_v]`` of one tile."""
        problem = self.problem
        k, v = self.load(self.k, begin, wide), self.load(self.v, begin, wide)
        q = self.q.to(wide).transpose(0, 1)
        if bug == "dot products in TF32":
            q, k = tf32(q), tf32(k)
        heads = torch.arange(problem.num_q_heads)
        heads = (
            heads % problem.num_kv_heads if bug == "GQA heads interleaved" else heads // problem.group_size
        )
        scale = problem.logit_scale
        if bug == "scale dropped":
            scale = problem.head_dim**-0.5
        elif bug == "scale of head_dim_v" and problem.scale is None:
            scale = problem.head_dim_v**-0.5
        logits = (q @ k[heads].transpose(1, 2)) * scale
        cap = problem.softcap
        if cap is not None and bug != "softcap dropped":
            logits = cap * torch.tanh(logits / cap)
        inside = torch.arange(begin, begin + TILE) < self.length
        if bug == "missing column mask":
            there = torch.arange(self.start + begin, self.start + begin + TILE) < len(self.k)
            inside = torch.ones_like(inside) & there
        if bug != "values of padding not masked":
            v = v.masked_fill(~inside[:, None], 0.0)
        visible = self.visible(torch.arange(begin, begin + TILE), bug) & inside
        return logits.masked_fill(~visible, -math.inf), v[heads]

    def load(self, tensor: Tensor, begin: int, wide: torch.dtype) -> Tensor:
        """A tile ``[num_kv_heads, TILE, dim]``; past the end of memory it is NaN."""
        tokens = tensor[self.start + begin : self.start + begin + TILE].to(wide)
        tile = torch.full((TILE, *tensor.shape[1:]), math.nan, dtype=wide)
        tile[: len(tokens)] = tokens
        return tile.transpose(0, 1)

    def visible(self, keys: Tensor, bug: str | None) -> Tensor:
        """Which query sees which key of the segment, ``[q_len, len(keys)]``."""
        problem, q_len = self.problem, len(self.q)
        queries = torch.arange(q_len)[:, None]
        if bug != "causal mask top-left":
            queries = queries + self.path_len - q_len
        distance = queries - (keys + self.seen)
        visible = torch.ones(distance.shape, dtype=torch.bool)
        if bug == "prefix never masked" and not self.is_last:
            return visible
        if problem.causal:
            least = {"causal mask off by one": 1, "causal mask one too many": -1}.get(bug or "", 0)
            visible &= distance >= least
        if problem.window is not None:
            if bug == "window counted per segment":
                distance = queries - self.path_len + self.length - keys
            visible &= distance < problem.window + (bug == "window off by one")
        return visible


def lse_of_nothing(bug: str | None) -> float:
    return {
        "empty segment has lse 0": 0.0,
        "empty segment has lse +inf": math.inf,
        "empty segment has a finite lse": -49993.0,
    }.get(bug or "", -math.inf)


def merge(
    problem: Problem, states: list[State], sinks: Tensor | None, path_len: int, bug: str | None
) -> State:
    """All partial results of a row, and the sink, which is a state of zero value."""
    sink_counts = 0 if sinks is None else 1
    if bug == "sink in every segment":
        sink_counts *= len(states)
    if bug == "sink dropped for an empty first segment" and problem.kv_lens[0] == 0:
        sink_counts = 0
    if sinks is not None:
        sink = State(torch.zeros_like(states[0].out), sinks.expand_as(states[0].lse).to(states[0].lse.dtype))
        states = [*states, *[sink] * sink_counts]
    lses = torch.stack([state.lse for state in states])  # [states, q_len, num_q_heads]
    if bug == "lse transposed in the merge" and len(states) > 1:
        lses = lses.transpose(1, 2).reshape(lses.shape)
    pivot = lses.amax(0)
    if bug != "unguarded -inf - -inf":
        pivot = pivot.masked_fill(pivot == -math.inf, 0.0)
    weights = torch.exp(lses - pivot)
    total = weights.sum(0)
    empty = total == 0
    weights = weights / total.masked_fill(empty, 1)
    out = (weights[..., None] * torch.stack([state.out for state in states])).sum(0)
    if bug == "merge bounded by flat offset only":
        out = spilled(out, weights, states)
    lse = (pivot + total.masked_fill(empty, 1).log()).masked_fill(empty, lse_of_nothing(bug))
    if bug == "sink missing from lse" and sinks is not None:
        lse = lse + torch.log1p(-torch.exp(sinks - lse).clamp(max=1.0))
    return State(out, lse)


def spilled(out: Tensor, weights: Tensor, states: list[State]) -> Tensor:
    """Each row written a power of two wide, in an order in which the rows after it are already there."""
    head_dim_v = out.shape[-1]
    width = 2 ** math.ceil(math.log2(head_dim_v))
    flat = out.flatten().clone()
    parts = torch.stack([state.out.flatten() for state in states])
    per_row = weights.flatten(1)
    for row in reversed(range(out.numel() // head_dim_v)):
        columns = torch.arange(row * head_dim_v, min(row * head_dim_v + width, flat.numel()))
        flat[columns] = (per_row[:, row, None] * parts[:, columns]).sum(0)
    return flat.view(out.shape)


def misplaced(problem: Problem, results: list[State], bug: str | None) -> list[State]:
    """Results at the places of other rows, where the shapes let it pass."""
    order = list(range(problem.num_rows))
    if bug == "rows in tree order":
        order.sort(key=lambda row: problem.row_to_node[row])
    elif bug == "empty row moves the rows after it":
        order.sort(key=lambda row: problem.path_len(row) == 0)
    elif bug == "one row per node":
        order = [problem.row_to_node.index(problem.row_to_node[row]) for row in order]
    moved = [results[row] for row in order]
    fitting = all(state.out.shape == moved[row].out.shape for row, state in enumerate(results))
    return moved if fitting else results


def tf32(tensor: Tensor) -> Tensor:
    """Round float32 to the 10 bits of fraction that TF32 keeps; leave other dtypes alone."""
    if tensor.dtype != torch.float32:
        return tensor
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)

"""Judge a forest of thousands of rows at once, on the device where it was computed.

The same oracle and the same budget as `hydragen.testing.budget`, in PyTorch and for many rows together:
float64 attention over each row's own copy of its keys, no sharing, no merging. Tests hold it to the NumPy
oracle; `check_oracle` does so for part of a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydragen.testing.budget import RowBudget, compute_budgets, compute_oracle
from hydragen.testing.inputs import Inputs
from hydragen.testing.problem import Problem

_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}  # of float64 keys at a time


@dataclass(frozen=True, eq=False)
class Judged:
    """Rows of a problem, in the caller's order.

    Attributes
    ----------
    out, lse
        Largest error of each row as a multiple of its budget, float64 ``[num_rows]`` on the CPU.
    """

    out: Tensor
    lse: Tensor

    @property
    def failing_rows(self) -> list[int]:
        """Rows outside of their budget."""
        return ((self.out > 1) | (self.lse > 1)).nonzero().flatten().tolist()


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Rows of similar length, padded: indices, which of them exist, and what each query sees."""

    rows: NDArray[np.int64]
    queries: Tensor  # int64 [rows, q_len]
    has_query: Tensor  # bool [rows, q_len]
    keys: Tensor  # int64 [rows, path_len]
    has_key: Tensor  # bool [rows, path_len]
    visible: Tensor  # bool [rows, q_len, path_len]


def judge_rows(problem: Problem, inputs: Inputs, out: Tensor, lse: Tensor | None) -> Judged:
    """Compare a result with float64 attention, row by row, on the device of ``out``.

    Parameters
    ----------
    inputs
        What it was computed from, on any device.
    out, lse
        ``[total_q, num_q_heads, head_dim_v]`` and ``[total_q, num_q_heads]``; None leaves ``lse`` unjudged.

    Raises
    ------
    ValueError
        If ``out`` or ``lse`` has another dtype or shape than the problem demands.
    """
    shape = (problem.total_q, problem.num_q_heads)
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
    for name, value, wanted, dtype in (
        ("out", out, (*shape, problem.head_dim_v), problem.dtype),
        ("lse", lse, shape, wide),
    ):
        if value is not None and (tuple(value.shape) != wanted or value.dtype != dtype):
            raise ValueError(f"{name} must be {dtype} {wanted}, got {value.dtype} {tuple(value.shape)}")
    there = inputs.to(out.device)
    # on the device until the end: one transfer for all
    ratios = torch.zeros(2, problem.num_rows, dtype=torch.float64, device=out.device)
    for chunk in _chunks(problem, out.device):
        budgets, expected_out, expected_lse = _budgets(problem, there, chunk)
        rows = torch.from_numpy(chunk.rows).to(out.device)
        ratios[0, rows] = _worst(out[chunk.queries], expected_out, chunk, budgets["out"])
        if lse is not None:
            ratios[1, rows] = _worst(lse[chunk.queries], expected_lse, chunk, budgets["lse"])
    return Judged(*ratios.cpu())


def check_oracle(problem: Problem, inputs: Inputs, device: torch.device | str) -> float:
    """Largest difference of this module's results and budgets from those of the NumPy oracle.

    In units of ``1e-14`` of the largest logit (times the largest value, for ``out``), and of ``1e-4`` for
    budgets. The error of dense attention in a budget depends on the order of sums: it may differ by what the
    budget allows besides. At most 1 if both are right.
    """
    there = inputs.to(device)
    expected = compute_oracle(problem, inputs.to("cpu"))
    budgets = compute_budgets(problem, inputs.to("cpu"), expected)
    worst = 0.0
    starts = inputs.cu_seqlens_q.tolist()
    for chunk in _chunks(problem, torch.device(device)):
        mine, out, lse = _budgets(problem, there, chunk)
        for place, row in enumerate(chunk.rows.tolist()):
            tokens = slice(starts[row], starts[row + 1])
            count = starts[row + 1] - starts[row]
            magnitude = 1e-14 * budgets[row].magnitude
            for got, true, tolerance in (
                (out[place, :count], expected.out[tokens], magnitude * budgets[row].max_v),
                (lse[place, :count], expected.lse[tokens], magnitude),
            ):
                apart = float(_errors(got.cpu(), true).max())
                worst = max(worst, apart / max(tolerance, 1e-300) if apart else 0.0)
            worst = max(worst, _apart(mine, place, budgets[row]))
    return worst


def _apart(mine: dict[str, Tensor], place: int, budget: RowBudget) -> float:
    """Difference of both budgets: of what is no measured error in 1e-4, of the dense error in the rest."""
    worst = 0.0
    for name, dense in (("out", budget.dense_out), ("lse", budget.dense_lse)):
        my_dense = float(mine[f"dense_{name}"][place])
        my_rest, rest = float(mine[name][place]) - 2 * my_dense, getattr(budget, name) - 2 * dense
        if my_rest != rest:
            worst = max(worst, abs(my_rest - rest) / max(rest, 1e-300) / 1e-4)
        if my_dense != dense:  # sums of float32 numbers in another order
            worst = max(worst, abs(my_dense - dense) / max(rest, 1e-300))
    return worst


def _chunks(problem: Problem, device: torch.device) -> Iterator[_Chunk]:
    """Rows by length, so that little is padding, in chunks that fit into memory."""
    kv_lens, q_lens = (np.array(lens, np.int64) for lens in (problem.kv_lens, problem.q_lens))
    paths = _paths(problem)
    lens = np.where(paths >= 0, kv_lens[paths], 0)  # [rows, depth]
    starts = (np.cumsum(kv_lens) - kv_lens)[paths]
    q_starts = np.cumsum(q_lens) - q_lens
    path_lens = lens.sum(1)
    order = np.argsort(path_lens, kind="stable")
    sizes = path_lens[order]
    width = problem.num_kv_heads * (problem.head_dim + problem.head_dim_v)
    limit = _ELEMENTS.get(device.type, _ELEMENTS["cpu"])
    begin = 0
    while begin < order.size:
        padded = np.arange(1, order.size - begin + 1) * np.maximum(sizes[begin:] * width, 1)
        fitting = int(np.searchsorted(padded, limit, "right"))
        similar = int(np.searchsorted(sizes[begin:], 2 * sizes[begin] + 32, "right"))
        rows = order[begin : begin + max(1, min(fitting, similar))]
        begin += rows.size
        yield _chunk(problem, rows, lens[rows], starts[rows], q_lens[rows], q_starts[rows], device)


def _paths(problem: Problem) -> NDArray[np.int64]:
    """Nodes from the root down to each row's end, ``[rows, depth]``, with -1 before shorter paths."""
    parents = np.array(problem.parents, np.int64)
    node = np.array(problem.row_to_node, np.int64)
    levels = []
    while (node >= 0).any():
        levels.append(node)
        node = np.where(node >= 0, parents[node], -1)
    return np.stack(levels[::-1], 1)


def _chunk(
    problem: Problem,
    rows: NDArray[np.int64],
    lens: NDArray[np.int64],
    starts: NDArray[np.int64],
    q_lens: NDArray[np.int64],
    q_starts: NDArray[np.int64],
    device: torch.device,
) -> _Chunk:
    """Tables of some rows, from lengths and first tokens ``[rows, depth]`` of the nodes on their paths."""
    path_lens = lens.sum(1)
    longest, most = int(path_lens.max()), int(q_lens.max())
    has_key = np.arange(longest) < path_lens[:, None]
    keys = np.zeros(has_key.shape, np.int64)
    flat, first = lens.ravel(), np.cumsum(lens.ravel()) - lens.ravel()
    keys[has_key] = np.repeat(starts.ravel() - first, flat) + np.arange(flat.sum())
    has_query = np.arange(most) < q_lens[:, None]
    queries = np.where(has_query, q_starts[:, None] + np.arange(most), 0)
    tables = (queries, has_query, keys, has_key, path_lens - q_lens)
    q_index, there_q, k_index, there_k, first_position = (
        torch.from_numpy(table).to(device) for table in tables
    )
    position = first_position[:, None, None] + torch.arange(most, device=device)[:, None]
    distance = position - torch.arange(longest, device=device)
    visible = there_k[:, None] & there_q[:, :, None]
    if problem.causal:
        visible &= distance >= 0
    if problem.window is not None:
        visible &= distance < problem.window
    return _Chunk(rows, q_index, there_q, k_index, there_k, visible)


def _budgets(problem: Problem, inputs: Inputs, chunk: _Chunk) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Budgets of ``out`` and ``lse`` per row, and the oracle's ``out`` and ``lse`` ``[rows, q_len, ...]``."""
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
    eps, eps_state = torch.finfo(problem.dtype).eps, torch.finfo(wide).eps
    q = inputs.q[chunk.queries].transpose(1, 2)  # [rows, num_q_heads, q_len, head_dim]
    k, v = (
        x[chunk.keys].transpose(1, 2) for x in (inputs.k, inputs.v)
    )  # [rows, num_kv_heads, path_len, ...]
    visible = chunk.visible[:, None]
    sinks = inputs.sinks
    both = torch.cat([v.double(), v.double().abs()], -1)
    out, lse = _attend(problem, q.double(), k.double(), both, visible, sinks)
    out, absolute = out[..., : problem.head_dim_v], out[..., problem.head_dim_v :]
    dense_out, dense_lse = _attend(problem, q.to(wide), k.to(wide), v.to(wide), visible, sinks)
    there = chunk.has_query[:, None]
    dense_out_error = _errors(dense_out.to(problem.dtype), out).amax(-1).masked_fill(~there, 0.0)
    dense_lse_error = _errors(dense_lse, lse).masked_fill(~there, 0.0)
    magnitudes = _by_group(q.to(wide).abs(), k.to(wide).abs().transpose(2, 3)) * abs(problem.logit_scale)
    logits = _per_row(magnitudes.masked_fill(~visible, 0.0)).clamp(min=1.0)
    finite_lse = lse.abs().masked_fill(~lse.isfinite() | ~there, 0.0)
    magnitude = torch.maximum(logits, _per_row(finite_lse))
    max_v = _per_row(v.double().abs().amax(-1).masked_fill(~chunk.has_key[:, None], 0.0))
    logit = max(4.0, math.sqrt(problem.head_dim)) * eps_state * magnitude
    absolute_row = _per_row(absolute.amax(-1).masked_fill(~there, 0.0))
    dense_out_row, dense_lse_row = _per_row(dense_out_error), _per_row(dense_lse_error)
    budgets = {
        "out": 2 * dense_out_row + eps * absolute_row + logit * max_v,
        "lse": 2 * dense_lse_row + logit,
        "dense_out": dense_out_row,
        "dense_lse": dense_lse_row,
    }
    return budgets, out.transpose(1, 2), lse.transpose(1, 2)


def _attend(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention with all keys at once, in the dtype of ``q``: ``[rows, num_q_heads, q_len, ...]``."""
    logits = _by_group(q, k.transpose(2, 3)) * problem.logit_scale
    if problem.softcap is not None:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    logits = logits.masked_fill(~visible, -math.inf)
    num_keys = logits.shape[-1]
    if sinks is not None:
        sink = sinks.to(q.dtype)[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], -1)
    lse = torch.logsumexp(logits, -1)
    nothing = (lse == -math.inf)[..., None]  # to attend to: not NaN
    weights = torch.softmax(logits, -1).masked_fill(nothing, 0.0)
    return _by_group(weights[..., :num_keys], v), lse


def _by_group(x: Tensor, y: Tensor) -> Tensor:
    """``x [rows, num_q_heads, q_len, n] @ y [rows, num_kv_heads, n, m]``: query heads share a KV head."""
    num_rows, num_q_heads, q_len, n = x.shape
    stacked = x.reshape(num_rows, y.shape[1], num_q_heads // y.shape[1] * q_len, n)
    return (stacked @ y).reshape(num_rows, num_q_heads, q_len, y.shape[3])


def _per_row(x: Tensor) -> Tensor:
    """Largest value of each row, float64."""
    flat = x.flatten(1)
    return flat.amax(1).double() if flat.shape[1] else x.new_zeros(x.shape[0], dtype=torch.float64)


def _errors(got: Tensor, expected: Tensor) -> Tensor:
    """Absolute errors: 0 between equal infinities, infinity where only one is one or a NaN appears."""
    got, expected = got.double(), expected.double()
    error = (got - expected).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return error.masked_fill(got == expected, 0.0)


def _worst(got: Tensor, expected: Tensor, chunk: _Chunk, allowed: Tensor) -> Tensor:
    """Largest error of each row, in budgets."""
    error = _errors(got, expected).flatten(2)
    error = error.amax(2).masked_fill(~chunk.has_query, 0.0).amax(1)
    return torch.where(error <= allowed, (error / allowed).nan_to_num(nan=0.0), error / allowed)

"""The answer in float64 for some rows, and how far from it a result may be: a wrong one gets no time.

Dense attention over each row's whole path, on the device that times: large problems take milliseconds. Every
small problem is judged by `property_tests/`.
"""

from dataclasses import dataclass

import torch
from shapes import Inputs
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Truth:
    """The checked rows, their result [rows, q_len, num_q_heads, head_dim] in float64, the errors allowed."""

    rows: list[int]
    out: Tensor
    budgets: list[float]


def sampled_rows(num_rows: int, path_len: int) -> list[int]:
    """All rows of a small problem; else first, last and evenly between, and as many from a fixed seed."""
    if num_rows <= 16 or num_rows * path_len <= 1 << 18:
        return list(range(num_rows))
    evenly = torch.linspace(0, num_rows - 1, 8).round().long().tolist()
    drawn = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))[:8].tolist()
    return sorted({*evenly, *drawn})


def attend(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, visible: Tensor) -> Tensor:
    """Attention of queries [n, head_dim] over k and v [tokens, head_dim], computed in `dtype`."""
    logits = (q.to(dtype) @ k.to(dtype).T * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    return logits.softmax(-1) @ v.to(dtype)


def solve(inputs: Inputs) -> Truth:
    """The truth about `inputs`.

    Budget: 2 max|dense - exact| + eps(dtype) max|exact| + eps(float32) max(1, sum|q||k|scale) max|v|,
    where dense attention has logits and sums in float32 and its result in the dtype.
    """
    shape = inputs.shape
    rows = sampled_rows(shape.batch, int(shape.tree.path_lens.max()))
    size = len(rows), shape.q_len, shape.num_q_heads, shape.head_dim
    out = torch.empty(size, dtype=torch.float64, device=inputs.q.device)
    budgets = []
    for i, row in enumerate(rows):
        nodes = list(inputs.path(row))
        largest = []
        for head in range(shape.num_kv_heads):
            k, v = (torch.cat([kv[side][:, head] for kv in nodes]) for side in (0, 1))
            of_head = slice(head * shape.group_size, (head + 1) * shape.group_size)
            q = inputs.q[row, :, of_head].transpose(0, 1).flatten(0, 1)  # [group_size * q_len, head_dim]
            visible = torch.ones(shape.q_len, len(k), dtype=torch.bool, device=k.device)
            if shape.causal:
                visible = visible.tril(len(k) - shape.q_len)
            visible = visible.repeat(shape.group_size, 1)
            exact = attend(q, k, v, torch.float64, visible)
            dense = attend(q, k, v, torch.float32, visible).to(shape.dtype)
            out[i, :, of_head] = exact.unflatten(0, (shape.group_size, shape.q_len)).transpose(0, 1)
            products = q.float().abs() @ k.float().abs().T * shape.head_dim**-0.5
            of_interest = dense - exact, exact, products, v.double()
            largest.append(torch.stack([x.abs().max().double() for x in of_interest]))
        error, value, product, max_v = torch.stack(largest).amax(0).tolist()
        eps, eps_state = torch.finfo(shape.dtype).eps, torch.finfo(torch.float32).eps
        budgets.append(2 * error + eps * value + eps_state * max(1.0, product) * max_v)
    return Truth(rows, out, budgets)


def assert_exact(truth: Truth, out: Tensor, name: str) -> None:
    """Compare the checked rows of `out` [batch, q_len, num_q_heads, head_dim], and look for NaN in all."""
    __tracebackhide__ = True
    if not bool(out.isfinite().all()):
        raise AssertionError(f"{name}: the result has values that are not finite")
    got = out[torch.tensor(truth.rows, device=out.device)].double()
    errors = (got - truth.out).abs().flatten(1).amax(1).tolist()
    for row, error, budget in zip(truth.rows, errors, truth.budgets, strict=True):
        if not error <= budget:
            raise AssertionError(f"{name}: row {row} is off by {error:.3g}, the budget is {budget:.3g}")

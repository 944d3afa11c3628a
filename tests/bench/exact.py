"""The answer in float64 for some rows, and how far from it a result may be: a wrong one gets no time.

Dense attention over each row's whole path, on the device that times: large problems take milliseconds. The
budget is that of `hydragen.testing`, whose own oracle judges every small problem in `property_tests/`.
"""

from dataclasses import dataclass

import torch
from shapes import Inputs
from torch import Tensor

from hydragen.testing import RowBudget


@dataclass(frozen=True, eq=False)
class Truth:
    """The checked rows, their result in float64 [rows, q_len, num_q_heads, head_dim], a budget for each."""

    rows: list[int]
    out: Tensor
    budgets: list[RowBudget]


def sampled_rows(num_rows: int, path_len: int) -> list[int]:
    """All rows of a small problem; else first, last and evenly between, and as many from a fixed seed."""
    if num_rows <= 16 or num_rows * path_len <= 1 << 18:
        return list(range(num_rows))
    evenly = torch.linspace(0, num_rows - 1, 8).round().long().tolist()
    drawn = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))[:8].tolist()
    return sorted({*evenly, *drawn})


def attend(
    q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, visible: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of queries [n, head_dim] over k and v [tokens, head_dim], computed in `dtype`.

    Returns out [n, head_dim], the same for the magnitudes of v, and lse [n].
    """
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    logits = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    weights = logits.softmax(-1)
    return weights @ v, weights @ v.abs(), logits.logsumexp(-1)


def solve(inputs: Inputs) -> Truth:
    """The truth about `inputs`."""
    shape = inputs.shape
    rows = sampled_rows(shape.batch, int(shape.tree.path_lens.max()))
    out = torch.empty(
        len(rows), shape.q_len, shape.num_q_heads, shape.head_dim, dtype=torch.float64, device=inputs.q.device
    )
    budgets = []
    for i, row in enumerate(rows):
        nodes = list(inputs.path(row))
        worst = dict.fromkeys(("dense_out", "dense_lse", "absolute", "magnitude", "max_v"), 0.0)
        for head in range(shape.num_kv_heads):
            k, v = (torch.cat([kv[side][:, head] for kv in nodes]) for side in (0, 1))
            queries = slice(head * shape.group_size, (head + 1) * shape.group_size)
            q = (
                inputs.q[row, :, queries].transpose(0, 1).reshape(-1, shape.head_dim)
            )  # [group * q_len, head_dim]
            visible = torch.ones(shape.q_len, len(k), dtype=torch.bool, device=k.device)
            if shape.causal:
                visible = visible.tril(len(k) - shape.q_len)
            visible = visible.repeat(shape.group_size, 1)
            exact, absolute, lse = attend(q, k, v, torch.float64, visible)
            dense, _, dense_lse = attend(q, k, v, torch.float32, visible)
            out[i, :, queries] = exact.unflatten(0, (shape.group_size, shape.q_len)).transpose(0, 1)
            magnitude = (q.float().abs() @ k.float().abs().T).max() * shape.head_dim**-0.5
            found = {
                "dense_out": (dense.to(shape.dtype) - exact).abs().max(),
                "dense_lse": (dense_lse - lse).abs().max(),
                "absolute": absolute.max(),
                "magnitude": torch.maximum(magnitude, lse.abs().max()),
                "max_v": v.abs().max(),
            }
            for name, value in found.items():
                worst[name] = max(worst[name], float(value))
        worst["magnitude"] = max(1.0, worst["magnitude"])
        eps, eps_state = torch.finfo(shape.dtype).eps, torch.finfo(torch.float32).eps
        budgets.append(RowBudget(**worst, eps=eps, eps_state=eps_state))
    return Truth(rows, out, budgets)


def assert_exact(truth: Truth, out: Tensor, name: str) -> None:
    """Compare the checked rows of `out` [batch, q_len, num_q_heads, head_dim], and look for NaN in all."""
    __tracebackhide__ = True
    if not bool(out.isfinite().all()):
        raise AssertionError(f"{name}: the result has values that are not finite")
    got = out[torch.tensor(truth.rows, device=out.device)].double()
    errors = (got - truth.out).abs().flatten(1).amax(1).tolist()
    for row, error, budget in zip(truth.rows, errors, truth.budgets, strict=True):
        if not error <= budget.out:
            raise AssertionError(
                f"{name}: row {row} is off by {error:.3g}, budget {budget.out:.3g} = {budget.explain('out')}"
            )

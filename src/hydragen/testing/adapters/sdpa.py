"""PyTorch's scaled_dot_product_attention, row by row, on keys and values copied along each row's path.

What a user has without sharing. Where masks are given as a tensor, PyTorch chooses the kernel itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hydragen.testing.budget import rows
from hydragen.testing.inputs import Inputs
from hydragen.testing.problem import Problem


def attention(problem: Problem, inputs: Inputs) -> Tensor:
    """``out`` alone: the public function does not return the log-sum-exp."""
    masked = problem.causal or problem.window is not None
    out = []
    for row in rows(problem, inputs):
        mask = row.visible.to(row.q.device) if masked else None
        out.append(
            scaled_dot_product_attention(row.q, row.k, row.v, attn_mask=mask, scale=problem.scale).transpose(
                0, 1
            )
        )
    return torch.cat(out)


# mypy does not know that functions may have attributes.
attention.capabilities = {  # type: ignore[attr-defined]
    "softcap": False,
    "sinks": False,
    "lse": False,
    "device": "cuda" if torch.cuda.is_available() else "cpu",
}

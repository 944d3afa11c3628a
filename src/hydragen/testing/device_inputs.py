"""Tensors of a problem drawn where they are used, for forests whose tensors would take NumPy minutes.

The modes are those of `hydragen.testing.inputs`, and tests hold both to the same laws. The bits are not: they
come from PyTorch's generator of the device, and another device or version may give others.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from hydragen.testing.inputs import STD, Inputs, drawn_shifts, offsets
from hydragen.testing.problem import Problem


def draw_inputs(problem: Problem, device: torch.device | str) -> Inputs:
    """Tensors of a problem on a device; offsets on the CPU.

    Returns
    -------
    Inputs
        As `hydragen.testing.inputs.build`, with other values of the same kind.
    """
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
    generator = torch.Generator(device).manual_seed(problem.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=wide)

    q = normal(problem.total_q, problem.num_q_heads, problem.head_dim)
    k = normal(problem.total_kv, problem.num_kv_heads, problem.head_dim)
    v = normal(problem.total_kv, problem.num_kv_heads, problem.head_dim_v)
    # what is drawn per node, per token of a query, or per head is small: NumPy chooses it
    rng = np.random.default_rng(problem.seed)
    q, k, sinks = (_spread if problem.sharpness in STD else _shifted)(problem, q, k, rng)
    return Inputs(
        q=q.to(problem.dtype),
        k=k.to(problem.dtype),
        v=v.to(problem.dtype),
        cu_seqlens_q=offsets(problem.q_lens),
        cu_seqlens_k=offsets(problem.kv_lens),
        sinks=sinks if problem.sinks else None,
    )


def _spread(
    problem: Problem, q: Tensor, k: Tensor, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """See `hydragen.testing.inputs._spread`."""
    std, root = STD[problem.sharpness], math.sqrt(problem.head_dim)
    k = k * (std / ((problem.logit_scale or 1.0) * root))
    if problem.sharpness == "peaked":
        q = q * (root / torch.linalg.vector_norm(q, dim=-1, keepdim=True))
    if problem.sharpness == "repeated":
        q, k = (
            x[_like(rng.integers(0, min(2, len(x)), len(x)), x, torch.int64)] if len(x) else x for x in (q, k)
        )
    return q, k, _like(rng.standard_normal(problem.num_q_heads) * std, q)


def _shifted(
    problem: Problem, q: Tensor, k: Tensor, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """See `hydragen.testing.inputs._shifted`."""
    _, num_q_heads, head_dim = q.shape
    shift, seen, sinks, scale, amplitude = drawn_shifts(problem, rng)
    k = k * (2.0 / (scale * math.sqrt(max(1, head_dim - 1))))
    if head_dim == 1:
        k = k / amplitude
    axes = rng.integers(0, head_dim, problem.num_kv_heads)
    shift_of_token = _like(np.repeat(shift / (scale * amplitude), problem.kv_lens), k)
    q_heads, kv_heads = (torch.arange(n, device=q.device) for n in (num_q_heads, problem.num_kv_heads))
    q_axes = _like(np.repeat(axes, problem.group_size), q, torch.int64)
    k_axes = _like(axes, k, torch.int64)
    q[:, q_heads, q_axes] = _like(amplitude * seen, q)[:, None]
    carried = k[:, kv_heads, k_axes] if head_dim == 1 else 0.0
    k[:, kv_heads, k_axes] = (shift_of_token[:, None] + carried).expand(-1, problem.num_kv_heads)
    return q, k, _like(sinks, q)


def _like(values: np.ndarray, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.from_numpy(values).to(dtype or tensor.dtype).to(tensor.device)

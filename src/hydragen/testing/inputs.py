"""Tensors of a problem, built so that attention matters and mistakes show.

Random queries and keys alone give nearly uniform weights, and those hide mapping errors: any average of many
values looks like any other. So a problem names a sharpness:

======================  =========================================================================
``flat``                logits of standard deviation 1
``peaked``              of standard deviation 5: the entropy of the weights is under half of its maximum
``lopsided``            each node is shifted by up to ±1e4, and rows differ in how much of it they see
``very_negative``       every logit is below -5e4, the finite "infinity" of some kernels
``some_very_negative``  every logit of about half of the queries is below -5e4, the others are flat
``repeated``            at most two different queries and two different keys per head
======================  =========================================================================

Values are signed, and rounded to the problem's dtype before anybody sees them: an implementation is judged on
the numbers it was given. NumPy draws them, so that they do not depend on the device or on the version of
PyTorch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hydragen.testing.pages import Pages, copied
from hydragen.testing.problem import Problem

if TYPE_CHECKING:
    from hydragen.testing.views import Memory

_Array = npt.NDArray[np.float64]

STD = {"flat": 1.0, "peaked": 5.0, "repeated": 2.0}
VERY_NEGATIVE = -6e4  # rounding to bfloat16 moves a product by less than 1 %: it stays below -5e4


@dataclass(frozen=True, eq=False)
class Inputs:
    """What an implementation is given.

    Attributes
    ----------
    q
        Queries ``[total_q, num_q_heads, head_dim]``, row after row.
    k, v
        Keys ``[total_kv, num_kv_heads, head_dim]`` and values ``[..., head_dim_v]``, node after node.
    cu_seqlens_q
        Offsets of the rows in ``q``, int32 ``[num_rows + 1]``, on the CPU.
    cu_seqlens_k
        Offsets of the nodes in ``k`` and ``v``, int32 ``[num_nodes + 1]``, on the CPU.
    sinks
        Logits ``[num_q_heads]``, float32 (float64 for float64 inputs), or None.
    pages
        Where keys and values are instead, if they are paged (`hydragen.testing.pages`): ``k`` and ``v`` are
        NaN then.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    sinks: Tensor | None = None
    pages: Pages | None = None

    def to(self, device: torch.device | str) -> Inputs:
        """The same values with the same strides on a device; the offsets stay on the CPU."""
        wanted = torch.device(device)
        if self.q.device.type == wanted.type and wanted.index in (None, self.q.device.index):
            return self
        q, k, v = (copied(tensor, device) for tensor in (self.q, self.k, self.v))
        sinks = None if self.sinks is None else self.sinks.to(device)
        pages = None if self.pages is None else self.pages.to(device)
        return replace(self, q=q, k=k, v=v, sinks=sinks, pages=pages)

    def clone(self) -> Inputs:
        """A copy that shares no memory; strides are kept, gaps between elements are NaN."""
        sinks = None if self.sinks is None else self.sinks.clone()
        q, k, v = (copied(tensor, tensor.device) for tensor in (self.q, self.k, self.v))
        pages = None if self.pages is None else self.pages.clone()
        return Inputs(q, k, v, self.cu_seqlens_q.clone(), self.cu_seqlens_k.clone(), sinks, pages)

    def with_memory(self, memory: Memory) -> Inputs:
        """The same values with other strides; see `hydragen.testing.views.restride`."""
        from hydragen.testing.views import restride  # noqa: PLC0415 - views.py imports this module

        q, k, v = (restride(tensor, memory) for tensor in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v)


def whole_memory(tensor: Tensor) -> Tensor:
    """All elements of the memory that a tensor lies in, [elements]: what lies between its own as well."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def offsets(lengths: tuple[int, ...]) -> Tensor:
    """Offsets of runs that lie one after the other, int32 ``[len(lengths) + 1]``."""
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def build(problem: Problem) -> Inputs:
    """Tensors of a problem on the CPU; the same problem gives the same bits."""
    rng = np.random.default_rng(problem.seed)
    if problem.sharpness in STD:
        q, k, sinks = _spread(problem, rng, STD[problem.sharpness])
    else:
        q, k, sinks = _shifted(problem, rng)
    v = rng.standard_normal((problem.total_kv, problem.num_kv_heads, problem.head_dim_v))
    wide = torch.float64 if problem.dtype == torch.float64 else torch.float32
    return Inputs(
        q=torch.from_numpy(q).to(problem.dtype),
        k=torch.from_numpy(k).to(problem.dtype),
        v=torch.from_numpy(v).to(problem.dtype),
        cu_seqlens_q=offsets(problem.q_lens),
        cu_seqlens_k=offsets(problem.kv_lens),
        sinks=torch.from_numpy(sinks).to(wide) if problem.sinks else None,
    )


def _shapes(problem: Problem) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    q_shape = (problem.total_q, problem.num_q_heads, problem.head_dim)
    return q_shape, (problem.total_kv, problem.num_kv_heads, problem.head_dim)


def _spread(problem: Problem, rng: np.random.Generator, std: float) -> tuple[_Array, _Array, _Array]:
    """Normal queries and keys whose logits have a standard deviation of ``std``."""
    q_shape, k_shape = _shapes(problem)
    q = rng.standard_normal(q_shape)
    scale = problem.logit_scale or 1.0
    k = rng.standard_normal(k_shape) * (std / (scale * math.sqrt(problem.head_dim)))
    if problem.sharpness == "peaked":
        # Queries of one length: none is nearly 0, which would make it flat.
        q *= math.sqrt(problem.head_dim) / np.linalg.norm(q, axis=-1, keepdims=True)
    if problem.sharpness == "repeated":
        q = q[rng.integers(0, min(2, q_shape[0]), q_shape[0])]
        k = k[rng.integers(0, min(2, k_shape[0]), k_shape[0])] if k_shape[0] else k
    return q, k, rng.standard_normal(problem.num_q_heads) * std


def drawn_shifts(problem: Problem, rng: np.random.Generator) -> tuple[_Array, _Array, _Array, float, float]:
    """What `_shifted` puts into keys and queries.

    Returns
    -------
    shift : float64 [num_nodes]
        Of the logits of each node's keys.
    seen : float64 [total_q]
        The part of it that each query token sees.
    sinks : float64 [num_q_heads]
    scale : float
        Of the logits; 1 in place of 0.
    amplitude : float
        Half of the shift's magnitude: that of the queries, so that neither side leaves the range of float16.
    """
    num_tokens, num_q_heads = problem.total_q, problem.num_q_heads
    if problem.sharpness == "lopsided":
        size = rng.choice([0.0, 1.0, 10.0, 100.0, 1e3, 1e4], problem.num_nodes)
        shift = size * rng.choice([-1.0, 1.0], problem.num_nodes)
        seen = rng.choice([1.0, -1.0, 0.5, -0.01], num_tokens)
        sinks = rng.choice([-10.0, 0.0, 10.0, 100.0], num_q_heads)
    else:
        shift = VERY_NEGATIVE - rng.choice([0.0, 0.0, 3.0, 1e4], problem.num_nodes)
        seen = np.ones(num_tokens)
        if problem.sharpness == "some_very_negative":
            seen = rng.integers(0, 2, num_tokens).astype(np.float64)
        sinks = np.full(num_q_heads, VERY_NEGATIVE) + rng.standard_normal(num_q_heads)
    scale = problem.logit_scale or 1.0
    amplitude = math.sqrt(max(1.0, float(np.abs(shift).max())) / abs(scale))
    return shift, seen, sinks, scale, amplitude


def _shifted(problem: Problem, rng: np.random.Generator) -> tuple[_Array, _Array, _Array]:
    """Keys whose logits are shifted node by node.

    One coordinate per KV head carries the shift and the others carry noise of standard deviation 2: added up
    in one coordinate, rounding to a half type would swallow the noise, and one key would take all the weight.
    """
    q_shape, k_shape = _shapes(problem)
    _, num_q_heads, head_dim = q_shape
    shift, seen, sinks, scale, amplitude = drawn_shifts(problem, rng)
    noise = 2.0 / (scale * math.sqrt(max(1, head_dim - 1)))
    q, k = rng.standard_normal(q_shape), rng.standard_normal(k_shape) * noise
    if head_dim == 1:
        k /= amplitude  # no other coordinate can carry the noise, and this one multiplies it by the amplitude
    axes = rng.integers(0, head_dim, problem.num_kv_heads)
    shift_of_token = np.repeat(shift, problem.kv_lens) / (scale * amplitude)
    for head in range(num_q_heads):
        q[:, head, axes[head // problem.group_size]] = amplitude * seen
    for head in range(problem.num_kv_heads):
        carried = k[:, head, axes[head]] if head_dim == 1 else 0.0
        k[:, head, axes[head]] = shift_of_token + carried
    return q, k, sinks

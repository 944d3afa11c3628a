"""The oracle's result for a problem, and how far from it a correct implementation may be.

No magic numbers: the error that dense attention makes in the same dtype on the unshared problem, and the
roundings that no implementation avoids, counted in eps. `property_tests/README.md` has the simulation behind
each term.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hydragen.testing.inputs import Inputs
from hydragen.testing.problem import Problem
from hydragen_reference.oracle import tree_attention

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Oracle:
    """Dense softmax attention in float64 on the inputs as given (already rounded to their dtype).

    Attributes
    ----------
    out
        float64 ``[total_q, num_q_heads, head_dim_v]``.
    lse
        float64 ``[total_q, num_q_heads]``, natural logarithm.
    absolute
        ``out`` for ``|v|`` in place of ``v``: the magnitudes that add up to ``out``, however much of them
        cancels.
    """

    out: Tensor
    lse: Tensor
    absolute: Tensor


@dataclass(frozen=True)
class RowBudget:
    """Largest errors allowed in one row (sequence) of a problem, and where they come from.

    Attributes
    ----------
    dense_out, dense_lse
        Largest error of dense attention in the same dtype.
    absolute
        Largest sum of the magnitudes that add up to an element of ``out``.
    logits
        The larger of 1 and ``Σ|q||k|·scale`` over visible pairs: what a logit's rounding is relative to.
    max_lse
        Largest magnitude of a finite ``lse``.
    max_v
        Largest magnitude of a value.
    head_dim
        Elements of a dot product.
    eps, eps_state
        Of the inputs' dtype, and of the dtype of logits, sums and partial results.
    """

    dense_out: float
    dense_lse: float
    absolute: float
    logits: float
    max_lse: float
    max_v: float
    head_dim: int
    eps: float
    eps_state: float

    @property
    def magnitude(self) -> float:
        """The largest number that is rounded to float32 on the way to ``lse``."""
        return max(self.logits, self.max_lse)

    @property
    def roundings(self) -> float:
        """How often, in effect, a logit is rounded.

        Scale, change of base, partial and merged ``lse``: 4. A dot product's roundings add up like a random
        walk.
        """
        return max(4.0, math.sqrt(self.head_dim))

    @property
    def logit(self) -> float:
        """How far a logit, or a partial ``lse``, may be off by rounding."""
        return self.roundings * self.eps_state * self.magnitude

    @property
    def out(self) -> float:
        """Dense error twice, one rounding each of weights and result, and max|v| times what logits move."""
        return 2 * self.dense_out + self.eps * self.absolute + self.logit * self.max_v

    @property
    def lse(self) -> float:
        """Dense error twice, and what logits move: at most as much as the logits."""
        return 2 * self.dense_lse + self.logit

    def explain(self, name: str) -> str:
        """The sum behind `out` or `lse`."""
        logit = f"{self.roundings:.3g} · {self.eps_state:.2g} · {self.magnitude:.4g}"
        if name == "lse":
            return f"2 · {self.dense_lse:.2g} (dense) + {logit} (logits)"
        return (
            f"2 · {self.dense_out:.2g} (dense) + {self.eps:.2g} · {self.absolute:.2g} (Σ p|v|) + "
            f"{logit} · {self.max_v:.2g} (logits · max|v|)"
        )


def compute_oracle(problem: Problem, inputs: Inputs) -> Oracle:
    """Run the oracle on CPU inputs."""

    def split(tensor: Tensor, lengths: tuple[int, ...]) -> list[_Array]:
        return [part.double().numpy() for part in tensor.split(list(lengths))]

    # |v| rides along as further columns of v: one run gives both results.
    out, lse = tree_attention(
        split(inputs.q, problem.q_lens),
        split(inputs.k, problem.kv_lens),
        split(torch.cat([inputs.v, inputs.v.abs()], -1), problem.kv_lens),
        problem.parents,
        problem.row_to_node,
        scale=problem.scale,
        causal=problem.causal,
        window=problem.window,
        softcap=problem.softcap,
        sinks=None if inputs.sinks is None else inputs.sinks.double().numpy(),
    )
    both = torch.from_numpy(np.concatenate(out))
    return Oracle(
        both[..., : problem.head_dim_v],
        torch.from_numpy(np.concatenate(lse)),
        both[..., problem.head_dim_v :],
    )


def compute_budgets(problem: Problem, inputs: Inputs, oracle: Oracle) -> list[RowBudget]:
    """One budget per row, from CPU inputs and the oracle's result for them."""
    eps = torch.finfo(problem.dtype).eps
    eps_state = torch.finfo(_wide(problem)).eps
    budgets = []
    lengths = list(problem.q_lens)
    for row, out, lse, absolute in zip(
        rows(problem, inputs),
        oracle.out.split(lengths),
        oracle.lse.split(lengths),
        oracle.absolute.split(lengths),
        strict=True,
    ):
        dense_out, dense_lse, logits = dense_attention(problem, row)
        budgets.append(
            RowBudget(
                dense_out=largest(errors(dense_out, out)),
                dense_lse=largest(errors(dense_lse, lse)),
                absolute=largest(absolute),
                logits=max(1.0, logits),
                max_lse=largest(lse),
                max_v=largest(row.v),
                head_dim=problem.head_dim,
                eps=eps,
                eps_state=eps_state,
            )
        )
    return budgets


@dataclass(frozen=True, eq=False)
class Row:
    """The unshared problem of one row: its queries, and per query head all keys and values along its path.

    Attributes
    ----------
    q, k, v
        ``[num_q_heads, q_len, head_dim]``, ``[num_q_heads, path_len, head_dim]``, ``[..., head_dim_v]``.
    visible
        Which query attends to which key, bool ``[q_len, path_len]``.
    sinks
        ``[num_q_heads]`` or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor
    sinks: Tensor | None


def rows(problem: Problem, inputs: Inputs) -> Iterator[Row]:
    """Each row of a problem without sharing."""
    q_starts, k_starts = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
    for row, q_len in enumerate(problem.q_lens):
        tokens = torch.cat([torch.arange(k_starts[node], k_starts[node + 1]) for node in problem.path(row)])
        path_len = len(tokens)
        distance = torch.arange(path_len - q_len, path_len)[:, None] - torch.arange(path_len)
        visible = torch.ones(q_len, path_len, dtype=torch.bool)
        if problem.causal:
            visible &= distance >= 0
        if problem.window is not None:
            visible &= distance < problem.window
        k, v = (
            x[tokens].transpose(0, 1).repeat_interleave(problem.group_size, 0) for x in (inputs.k, inputs.v)
        )
        q = inputs.q[q_starts[row] : q_starts[row + 1]].transpose(0, 1)
        yield Row(q, k, v, visible, inputs.sinks)


def dense_attention(problem: Problem, row: Row) -> tuple[Tensor, Tensor, float]:
    """Attention of one row with all keys at once: the accuracy that a user gives up by sharing, if any.

    Logits, softmax and sums are float32 and only ``out`` is rounded to the problem's dtype, as in PyTorch's
    math SDPA. Rounding the logits to the inputs' dtype as well would be the easier baseline, and a useless
    one: at logits of 1e4 bfloat16 makes errors of 32, so that any output at all would be within the budget.

    Returns
    -------
    out, lse
        ``[q_len, num_q_heads, head_dim_v]`` in the problem's dtype, ``[q_len, num_q_heads]`` in float32
        (float64 for float64).
    magnitude
        Largest ``Σ|q||k|·scale`` over visible pairs, 0 if there are none.
    """
    wide = _wide(problem)
    q, k, v = row.q.to(wide), row.k.to(wide), row.v.to(wide)
    # [num_q_heads, q_len, path_len]
    magnitudes = _product(q.abs(), k.abs().transpose(1, 2)) * abs(problem.logit_scale)
    logits = _product(q, k.transpose(1, 2)) * problem.logit_scale
    if problem.softcap is not None:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    logits = logits.masked_fill(~row.visible, -math.inf)
    if row.sinks is not None:
        sink = row.sinks.to(wide)[:, None, None].expand(-1, logits.shape[1], 1)
        logits = torch.cat([logits, sink], -1)
        v = torch.cat([v, v.new_zeros(v.shape[0], 1, v.shape[2])], 1)
    lse = torch.logsumexp(logits, -1)
    weights = torch.softmax(logits, -1).masked_fill(
        (lse == -math.inf)[..., None], 0.0
    )  # nothing visible: not NaN
    out = _product(weights, v).to(problem.dtype)
    return out.transpose(0, 1), lse.transpose(0, 1), largest(magnitudes[:, row.visible])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product, by NumPy: PyTorch's may be of TF32 or bfloat16 if whoever is judged has said so
    (``torch.set_float32_matmul_precision``), and the budget would grow with it.
    """
    return torch.from_numpy(np.matmul(a.numpy(), b.numpy()))


def errors(got: Tensor, expected: Tensor) -> Tensor:
    """Absolute errors in float64: 0 between equal infinities and between NaNs, inf if only one is such."""
    got, expected = got.double(), expected.double()
    error = (got - expected).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return error.masked_fill((got == expected) | (got.isnan() & expected.isnan()), 0.0)


def largest(tensor: Tensor) -> float:
    """Largest finite magnitude, 0 if there is none: NaN in an input must not make a budget boundless."""
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _wide(problem: Problem) -> torch.dtype:
    return torch.float64 if problem.dtype == torch.float64 else torch.float32

"""Hydragen's algorithm as first published, on the flash attention that PyTorch carries.

One pass over the shared prefix with the queries of all rows as one batch, one pass over the suffixes, and a
merge of the two by their log-sum-exps (Juravsky et al., 2024, arXiv 2402.05099, section 3 and appendix). As
in the published code, partial outputs have the dtype of the inputs and the merge guards nothing: it was made
for prefixes and suffixes that are not empty. Written anew from the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hydragen.testing.inputs import Inputs
from hydragen.testing.problem import Problem

# With their log-sum-exps, which torch's public function does not return: SLF001, there is no other name.
_gpu_flash = torch.ops.aten._scaled_dot_product_flash_attention  # noqa: SLF001
_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """PyTorch's own flash attention with its log-sum-exp.

    q ``[batch, heads, q_len, head_dim]``, k and v ``[batch, heads, kv_len, head_dim]``; returns ``out`` like
    q and ``lse [batch, heads, q_len]``, float32.
    """
    if k.shape[2] == 0 and q.device.type == "cpu":
        # as the GPU's kernel does it; the CPU's divides by zero and ends the process (pytorch/pytorch#141219)
        return torch.zeros_like(q), torch.full(q.shape[:-1], torch.inf)
    if q.device.type == "cuda":
        out, lse = _gpu_flash(q, k, v, 0.0, False, scale=scale)[:2]
    else:
        out, lse = _cpu_flash(q, k, v, scale=scale)
    return out, lse.float()


def attention(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` for a prefix (node 0) and a suffix per row."""
    k, v = (x.split(list(problem.kv_lens)) for x in (inputs.k, inputs.v))
    # inter-sequence batching: all queries are one sequence
    prefix = _attend(inputs.q, k[0], v[0], problem)
    suffixes = [
        _attend(q, k[node], v[node], problem)
        for q, node in zip(inputs.q.split(list(problem.q_lens)), problem.row_to_node, strict=True)
    ]
    suffix = tuple(torch.cat(parts) for parts in zip(*suffixes, strict=True))
    return merge(prefix, (suffix[0], suffix[1]))


def _attend(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Attention of packed queries over one segment: ``[tokens, heads, head_dim]`` and ``[tokens, heads]``."""
    k, v = (x.repeat_interleave(problem.group_size, 1) for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
    out, lse = flash(q, k, v, problem.scale)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over two key sets from the attention over each, with the largest log-sum-exp taken out."""
    outs, lses = (torch.stack(parts) for parts in zip(one, other, strict=True))
    largest = lses.amax(0)
    weights = torch.exp(lses - largest)
    total = weights.sum(0)
    out = (weights[..., None] * outs.float()).sum(0) / total[..., None]
    return out.to(outs.dtype), largest + total.log()


# mypy does not know that functions may have attributes.
attention.capabilities = {  # type: ignore[attr-defined]
    "trees": "prefix",
    "same_head_dim_v": True,
    "causal": False,
    "window": False,
    "softcap": False,
    "sinks": False,
    "lse": True,
    "device": "cuda" if torch.cuda.is_available() else "cpu",
}
if torch.cuda.is_available():  # what the GPU's kernel takes
    attention.capabilities |= {  # type: ignore[attr-defined]
        "dtypes": ("float16", "bfloat16"),
        "head_dims": (64, 128),
        "scale": False,  # torch 2.11's kernel returns NaN for a negative one
    }

"""PyTorch's FlexAttention over all rows at once: the tree is a mask over packed queries and keys.

Nothing is copied: a query sees the keys of the nodes on its row's path. Compiled on a GPU, unfused on a CPU.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from hydragen.testing.inputs import Inputs
from hydragen.testing.problem import Problem


@functools.cache
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled


def positions(problem: Problem, inputs: Inputs) -> Tensor:
    """How far each query is from each key along its row's path, int64 ``[total_q, total_kv]``.

    A key that is not on the path is marked by the smallest integer.
    """
    far = torch.iinfo(torch.int64).min
    distance = torch.full((problem.total_q, problem.total_kv), far, dtype=torch.int64)
    q_starts, k_starts = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
    for row, q_len in enumerate(problem.q_lens):
        path_len, before = problem.path_len(row), 0
        query = torch.arange(path_len - q_len, path_len)[:, None]
        for node in problem.path(row):
            key = torch.arange(before, before + problem.kv_lens[node])
            before += problem.kv_lens[node]
            distance[q_starts[row] : q_starts[row + 1], k_starts[node] : k_starts[node + 1]] = query - key
    return distance


def attention(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of all rows."""
    if problem.total_kv == 0:
        raise NotImplementedError("FlexAttention needs at least one key")
    device = inputs.q.device
    distance = positions(problem, inputs).to(device)
    visible = distance > torch.iinfo(torch.int64).min
    if problem.causal:
        visible &= distance >= 0
    if problem.window is not None:
        visible &= distance < problem.window

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001 - its signature
        return visible[query, key]

    cap = problem.softcap

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001 - its signature
        return score if cap is None else cap * torch.tanh(score / cap)

    call: Any = _compiled() if device.type == "cuda" else flex_attention
    q, k, v = (x.transpose(0, 1)[None] for x in (inputs.q, inputs.k, inputs.v))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        out, aux = call(
            q,
            k,
            v,
            score_mod=None if cap is None else capped,
            block_mask=create_block_mask(
                mask, None, None, problem.total_q, problem.total_kv, device=str(device)
            ),
            scale=problem.scale,
            enable_gqa=problem.group_size > 1,
            return_aux=AuxRequest(lse=True),
        )
    return out[0].transpose(0, 1), aux.lse[0].transpose(0, 1)


# mypy does not know that functions may have attributes.
attention.capabilities = {  # type: ignore[attr-defined]
    "poison": False,  # a mask gives what is not attended a weight of 0, and 0 times NaN is NaN
    "sinks": False,
    "lse": True,
    "device": "cuda" if torch.cuda.is_available() else "cpu",
}
if torch.cuda.is_available():  # the compiled kernel takes no smaller heads
    attention.capabilities["head_dims"] = (16, 32, 64, 128, 256)  # type: ignore[attr-defined]
    # torch 2.11's inductor finds no kernel for values smaller than keys
    attention.capabilities["same_head_dim_v"] = True  # type: ignore[attr-defined]

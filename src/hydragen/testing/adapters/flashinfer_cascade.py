"""FlashInfer's MultiLevelCascadeAttentionWrapper, where it is installed: a prefix and suffixes, paged.

Read against flashinfer-python 0.7.2.post1. `plan` takes per level the rows' offsets and a page table, and
`run` one pool of pages for all levels; scale and soft cap are those of every level. The causal mask is the
last level's alone, so causal queries that stand in the prefix are out of scope; a window would be counted
from the end of each level on its own, and `run` takes no sinks and returns no log-sum-exp. What is documented
is 1 to page_size tokens in a segment's last page: an empty segment, which is not mentioned, is handed
over as no pages and a last page of 0 tokens, for who asks with ``--capability empty=yes``. Needs a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from hydragen.testing.inputs import Inputs
from hydragen.testing.pages import paged
from hydragen.testing.problem import Problem

_PAGE_SIZE = 16
_WORKSPACE_BYTES = 128 * 2**20


@functools.cache
def _wrapper() -> Any:
    try:
        import flashinfer  # noqa: PLC0415 - optional, and only for a GPU
    except ImportError as error:
        raise ModuleNotFoundError(
            "this adapter needs the package flashinfer-python", name="flashinfer"
        ) from error
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    return flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")


def attention(problem: Problem, inputs: Inputs) -> Tensor:
    """``out`` for a prefix (node 0) and a suffix per row."""
    wrapper = _wrapper()
    own = [problem.kv_lens[node] for node in problem.row_to_node]
    if problem.causal and any(q_len > kv_len for q_len, kv_len in zip(problem.q_lens, own, strict=True)):
        raise NotImplementedError("causal queries must stand in their own segment: no other level is masked")
    pages = inputs.pages or paged(problem, inputs, _PAGE_SIZE)
    indptr = pages.page_indptr.tolist()
    levels: list[list[Tensor]] = [[], [], [], []]
    for nodes, q_indptr in (
        ((0,), torch.tensor([0, problem.total_q])),
        (problem.row_to_node, inputs.cu_seqlens_q),
    ):
        of_level = [pages.page_indices[indptr[node] : indptr[node + 1]] for node in nodes]
        counts = torch.tensor([0, *(len(indices) for indices in of_level)]).cumsum(0)
        lens = [problem.kv_lens[node] for node in nodes]
        last = [(kv_len - 1) % pages.page_size + 1 if kv_len else 0 for kv_len in lens]
        tables = (q_indptr, counts, torch.cat(of_level), torch.tensor(last))
        for level, table in zip(levels, tables, strict=True):
            level.append(table.to("cuda", torch.int32))
    wrapper.plan(
        *levels,
        problem.num_q_heads,
        problem.num_kv_heads,
        problem.head_dim,
        pages.page_size,
        causal=problem.causal,
        sm_scale=problem.logit_scale,
        logits_soft_cap=problem.softcap,
        q_data_type=problem.dtype,
        kv_data_type=problem.dtype,
    )
    out: Tensor = wrapper.run(inputs.q.contiguous(), (pages.k_cache, pages.v_cache))
    return out


# mypy does not know that functions may have attributes.
attention.capabilities = {  # type: ignore[attr-defined]
    "trees": "prefix",
    "paged": True,
    "dtypes": ("float16", "bfloat16"),
    "head_dims": (64, 128, 256),
    "same_head_dim_v": True,
    "empty": False,
    "window": False,
    "sinks": False,
    "lse": False,
    "device": "cuda",
}

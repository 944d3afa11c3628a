"""The public operations: check, plan, run."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from hydragen.backends import choose_backend
from hydragen.host_ints import IntArray
from hydragen.kv import KV
from hydragen.lengths import check_kv_lens
from hydragen.ops import attention_in_graph, implement
from hydragen.planned import Plan
from hydragen.target import target_of
from hydragen.transforms import check_no_transform, wraps_memory
from hydragen.tree import PrefixTree
from hydragen.types import AttentionState
from hydragen.validation import Call, check_attention, check_backend, check_bool
from hydragen.validation.planned import check_plan, check_reserve
from hydragen.work import WorkPlan, make_work_plan

# Plans by structure: a decode loop asks for the same one at every layer and, with lengths on the device,
# every step.
_PLANS: OrderedDict[tuple[object, ...], WorkPlan] = OrderedDict()
_MAX_PLANS = 128
_LOCK = threading.Lock()
# Plans in use by captured CUDA graphs: a graph reads their tables when it is replayed, at any later time.
_CAPTURED: set[WorkPlan] = set()


def attention(
    q: Tensor,
    kv: KV,
    *,
    tree: PrefixTree | None = None,
    kv_lens: object = None,
    cu_seqlens_q: Sequence[int] | IntArray | Tensor | None = None,
    max_seqlen_q: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    batch_invariant: bool = False,
    validate: bool = False,
) -> Tensor | AttentionState:
    """Exact softmax attention of every row over all the segments on its path through a tree of shared
    prefixes.

    Keys and values that sequences share are given once and read once: the queries of all rows that share a
    segment are stacked into one matrix, and partial results merge exactly by their log-sum-exp. Hydragen
    (Juravsky et al., 2024, arXiv 2402.05099), section 3, applied to any tree.

    Parameters
    ----------
    q : tensor [batch, q_len, num_q_heads, head_dim], or packed [total_q, num_q_heads, head_dim]
        float16, bfloat16, float32 or (reference backend) float64; any strides. Packed q needs `cu_seqlens_q`.
    kv : list of levels, PackedKV or PagedKV
        Level l holds the nodes of depth l in index order: a pair k [nodes, len, num_kv_heads, head_dim] and
        v [nodes, len, num_kv_heads, head_dim_v], or a PackedKV; in q's dtype and on its device. num_q_heads
        must be a multiple of num_kv_heads; head_dim and head_dim_v are 1 to 256. Without `tree`, groups are
        equal: node i of a level of n nodes hangs under node i // (n // n_above) and row r ends at node r //
        (batch // n_last). A PackedKV or PagedKV of all nodes without `tree` gives row i node i alone.
    tree : PrefixTree, optional
        Who shares what, and at which node each row ends.
    kv_lens : optional
        Tokens in use per node. Levels: a list with an entry per level, None (full) or one length per node.
        PackedKV, PagedKV: one length per node. Lengths on the host are checked. Those on q's device (int32 or
        int64) are never read back: they are clamped to the capacity. Default: the tree's lengths, else all
        tokens. What lies past a length is never used and may be NaN.
    cu_seqlens_q : integers [num_rows + 1], optional
        Offsets of each row's tokens in packed q. On q's device it is not read back, needs `max_seqlen_q`, and
        must end where q does: results of tokens behind the last offset are undefined.
    max_seqlen_q : int, optional
        The most query tokens of any row; needed only with `cu_seqlens_q` on a device.
    scale : float, optional
        Factor of the dot products; default head_dim ** -0.5.
    causal : bool
        Query i of a row with q_len queries stands at position path_len - q_len + i and sees keys up to there.
    window : int, optional
        A query at position p sees keys at positions above p - window. Positions count along the row's path.
    softcap : float, optional
        Logits become softcap * tanh(logit / softcap), before masking.
    sinks : tensor [num_q_heads], optional
        One more logit per head, whose value is zero, counted once per query; -inf counts for nothing.
    return_lse : bool
        Return an AttentionState with the log-sum-exp as well.
    out_dtype : torch.dtype, optional
        Dtype of `out`: q's (default) or float32, for partial results that are to be merged with others.
    backend : "auto", "reference" or "triton"
        "auto" is Triton for CUDA tensors and the reference elsewhere. What a backend cannot do raises.
    batch_invariant : bool
        A row's output bits do not depend on which other rows share the batch: fixed tiles and split
        boundaries.
    validate : bool
        Also check lengths and page numbers that live on the device; waits for it.

    Returns
    -------
    tensor or AttentionState
        `out` shaped like q with head_dim_v, in `out_dtype`. With `return_lse`, (out, lse): lse shaped like q
        without its last dimension, float32 (float64 for float64), natural log. A row that has nothing to
        attend gets out = 0 and lse = -inf (with sinks: lse = sink). A logit or sink of +inf, also one beyond
        the range of float32, makes out NaN, as in softmax.

    Raises
    ------
    TypeError, ValueError
        If arguments do not fit together, or the backend cannot do what is asked for.

    Examples
    --------
    >>> import torch
    >>> q = torch.randn(4, 1, 8, 64)
    >>> prefix_k, prefix_v = torch.randn(2, 1, 100, 2, 64)
    >>> suffix_k, suffix_v = torch.randn(2, 4, 10, 2, 64)
    >>> attention(q, [(prefix_k, prefix_v), (suffix_k, suffix_v)], kv_lens=[None, [10, 3, 0, 7]]).shape
    torch.Size([4, 1, 8, 64])
    """
    arguments = (
        q, kv, tree, kv_lens, cu_seqlens_q, max_seqlen_q, scale, causal, window, softcap, sinks, return_lse,
        out_dtype, backend, batch_invariant, validate,
    )  # fmt: skip
    in_graph = torch.compiler.is_compiling() or isinstance(q, FakeTensor)
    state = attention_in_graph(*arguments) if in_graph else _attention(*arguments)
    return state if return_lse else state.out


def plan(
    tree: PrefixTree,
    kv: KV,
    *,
    num_q_heads: int,
    q_len: int | None = None,
    cu_seqlens_q: Sequence[int] | IntArray | Tensor | None = None,
    max_seqlen_q: int | None = None,
    total_q: int | None = None,
    kv_lens: object = None,
    backend: str = "auto",
    batch_invariant: bool = False,
    reserve: float = 1.0,
    validate: bool = False,
) -> Plan:
    """Lay the work of an attention step out once, for all layers and for later steps.

    Parameters
    ----------
    tree : PrefixTree
        Who shares what.
    kv : list of levels, PackedKV or PagedKV
        Keys and values of any layer, as in `attention`: their shapes, dtype, device and tables count, not
        what they hold.
    num_q_heads : int
        Query heads.
    q_len : int, optional
        Query tokens of each row; default 1.
    cu_seqlens_q, max_seqlen_q : optional
        Offsets of packed q instead, as in `attention`.
    total_q : int, optional
        Tokens of packed q; needed only with `cu_seqlens_q` on a device.
    kv_lens : optional
        Tokens in use per node, as in `attention`. Lists and arrays are part of the plan (with `reserve` they
        may change, but not grow). Tensors on kv's device may be updated: the plan is made for the capacity of
        these nodes and serves while they grow.
    backend, batch_invariant
        As in `attention`.
    reserve : float
        With more than 1, the tree may change too (`Plan.update`): there is room for that many times the work
        of this one, counted in tables of work items, partial results, nodes, and pairs of a node and an
        ancestor. A smaller tree may need more of one of them. One that does not fit is refused with the
        reserve that would have done; the plan stays as it was.
    validate : bool
        Also check lengths and page numbers that live on the device; waits for it.

    Returns
    -------
    Plan
        With `run`, `update` and `explain`.

    Raises
    ------
    TypeError, ValueError
        If arguments do not fit together.

    Examples
    --------
    >>> import torch
    >>> tree = PrefixTree.from_levels([[100], [10, 10, 10, 10]])
    >>> layers = [[tuple(torch.randn(2, n, t, 2, 64)) for n, t in ((1, 100), (4, 10))] for _ in range(3)]
    >>> lens = torch.tensor([3, 10, 0, 7])
    >>> step = plan(tree, layers[0], num_q_heads=8, kv_lens=[None, lens])
    >>> [step.run(torch.randn(4, 1, 8, 64), kv).shape for kv in layers][-1]
    torch.Size([4, 1, 8, 64])
    """
    check_backend(backend)
    check_bool(batch_invariant, "batch_invariant")
    check_bool(validate, "validate")
    check_no_transform("hydragen.plan", "plan before, or call hydragen.attention, which plans by itself")
    room = check_reserve(reserve)
    planned = check_plan(tree, kv, num_q_heads, q_len, cu_seqlens_q, max_seqlen_q, total_q, validate)
    device = planned.like.device
    lens = check_kv_lens(kv_lens, planned.tree, planned.nodes, device, validate, may_grow=True)
    return Plan(planned, lens, choose_backend(backend, planned.like), batch_invariant, room)


@implement
def _attention(
    q: Tensor, kv: KV, tree: PrefixTree | None, kv_lens: object,
    cu_seqlens_q: object, max_seqlen_q: int | None, scale: float | None, causal: bool, window: int | None,
    softcap: float | None, sinks: Tensor | None, return_lse: bool, out_dtype: torch.dtype | None,
    backend: str, batch_invariant: bool, validate: bool,
) -> AttentionState:  # fmt: skip
    check_backend(backend)
    check_bool(batch_invariant, "batch_invariant")
    call = check_attention(
        q,
        kv,
        tree,
        kv_lens,
        cu_seqlens_q,
        max_seqlen_q,
        scale,
        causal,
        window,
        softcap,
        sinks,
        return_lse,
        out_dtype,
        validate,
    )
    return choose_backend(backend, q).run(_plan(call, batch_invariant), call)


def _plan(call: Call, batch_invariant: bool) -> WorkPlan:
    """Return the plan for a call's structure, made once; within a transform that wraps what the plan uploads,
    one for this call alone.
    """
    nodes, lens = call.nodes, call.kv_lens.planned
    lens_on_device = len(call.kv_lens.on_device) > 0
    key = (
        call.tree,
        nodes.packed,
        None if nodes.pages is None else nodes.pages.size,
        None if nodes.by_level and not any(nodes.packed) else nodes.slot.tobytes(),
        lens.tobytes(),
        lens_on_device,
        call.q_starts.tobytes(),
        call.q_lens.tobytes(),
        call.heads,
        call.q.device,
        batch_invariant,
    )
    wrapped = wraps_memory()
    plan = None if wrapped else _PLANS.get(key)
    if plan is None:
        target = target_of(call.q.device)
        plan = make_work_plan(
            call.tree,
            nodes,
            lens,
            lens_on_device,
            call.q_starts,
            call.q_lens,
            call.heads,
            target,
            batch_invariant,
        )
    if wrapped:
        return plan
    with _LOCK:
        _PLANS[key] = plan
        _PLANS.move_to_end(key)
        if len(_PLANS) > _MAX_PLANS:
            _PLANS.popitem(last=False)
    if call.q.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _CAPTURED.add(plan)
    return plan

"""Attention as a registered operator, for torch.compile and torch.export.

A graph holds tensors and numbers, so a PrefixTree travels by its handle and everything on the host as a CPU
tensor. Plans are made inside the operator, where a compiler does not look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from hydragen.handles import of_handle
from hydragen.kv import KV, PackedKV, PagedKV
from hydragen.transforms import check_fake
from hydragen.tree import PrefixTree
from hydragen.types import AttentionState
from hydragen_reference.segment import in_transform

_OUT_OF_GRAPH = "leave it out of the graph: torch.compiler.disable(hydragen.attention)(...), or (plan.run)"

# Set by api.py and planned.py: the eager implementations, which lie above this floor.
_eager: Callable[..., AttentionState] | None = None
_run_plan: Callable[..., AttentionState] | None = None


def implement(eager: Callable[..., AttentionState]) -> Callable[..., AttentionState]:
    """Make `eager` the code behind the operator and return it."""
    global _eager
    _eager = eager
    return eager


def implement_run(run: Callable[..., AttentionState]) -> Callable[..., AttentionState]:
    """Make `run` the code behind the operator of plans and return it."""
    global _run_plan
    _run_plan = run
    return run


@torch.library.custom_op("hydragen::attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    by_level: bool,
    offsets: Sequence[Tensor | None],
    page_indices: Tensor | None,
    sinks: Tensor | None,
    kv_lens: Sequence[Tensor | None],
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int | None,
    tree: int | None,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    return_lse: bool,
    out_dtype: torch.dtype | None,
    backend: str,
    batch_invariant: bool,
    validate: bool,
) -> tuple[Tensor, Tensor]:
    """`hydragen.attention`, flattened; lse is empty unless `return_lse`.

    `offsets` holds cu_seqlens_k of each packed level, or of all nodes, or page_indptr.
    """
    _refuse_tangents()
    if _eager is None:
        raise RuntimeError("hydragen.api must be imported before its operator is called")
    lens: object = None
    if len(kv_lens):
        lens = list(kv_lens) if by_level else kv_lens[0]
    kv = _unflattened(k, v, by_level, offsets, page_indices)
    with torch.no_grad():
        state = _eager(
            q, kv, None if tree is None else _tree(tree), lens, cu_seqlens_q, max_seqlen_q,
            scale, causal, window, softcap, sinks, return_lse, out_dtype, backend, batch_invariant, validate,
        )  # fmt: skip
    lse = state.lse if return_lse else q.new_empty(0, dtype=_lse_dtype(q))
    return state.out.contiguous(), lse.contiguous()


@attention_op.register_fake
def _(q: Tensor, _k: Sequence[Tensor], v: Sequence[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake(q, v, *rest[-5:-3])


def _fake(
    q: Tensor, v: Sequence[Tensor], return_lse: bool, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Return results without data."""
    _refuse_tangents()
    out = q.new_empty((*q.shape[:-1], v[0].shape[-1]), dtype=out_dtype)
    return out, q.new_empty(q.shape[:-1] if return_lse else (0,), dtype=_lse_dtype(q))


def _unflattened(
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    by_level: bool,
    offsets: Sequence[Tensor | None],
    page_indices: Tensor | None,
) -> KV | tuple[Tensor, Tensor]:
    """Return keys and values as they were given."""
    if by_level:
        levels = zip(k, v, offsets, strict=True)
        return [(ki, vi) if cu is None else PackedKV(ki, vi, cu) for ki, vi, cu in levels]
    (given,) = offsets
    if given is None:
        return k[0], v[0]
    if page_indices is None:
        return PackedKV(k[0], v[0], given)
    return PagedKV(k[0], v[0], given, page_indices)


def _tree(handle: int) -> PrefixTree:
    tree = of_handle(handle)
    if not isinstance(tree, PrefixTree):
        raise TypeError(f"tree must be the handle of a PrefixTree, got that of {type(tree).__name__}")
    return tree


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "hydragen.attention and Plan.run have no gradients inside torch.compile or torch.export yet; call "
        f"them under torch.no_grad(), or {_OUT_OF_GRAPH}"
    )


def _refuse_tangents() -> None:
    """Raise where forward-mode derivatives are taken: torch drops an operator's tangents without a word."""
    if in_transform():
        raise ValueError(
            "hydragen.attention and Plan.run have no forward-mode derivatives inside torch.compile, got a "
            f"call within torch.func.jvp, jacfwd or a dual level; {_OUT_OF_GRAPH}"
        )


def _mapped(*_: Any) -> Any:
    raise ValueError(
        "hydragen.attention and Plan.run cannot be mapped by torch.vmap inside torch.compile, got tensors "
        f"batched by it; make the mapped dimension part of the batch, or {_OUT_OF_GRAPH}"
    )


attention_op.register_autograd(_backward)
attention_op.register_vmap(_mapped)


def attention_in_graph(
    q: Tensor, kv: KV, tree: PrefixTree | None, kv_lens: Any, cu_seqlens_q: Any, max_seqlen_q: int | None,
    scale: float | None, causal: bool, window: int | None, softcap: float | None, sinks: Tensor | None,
    return_lse: bool, out_dtype: torch.dtype | None, backend: str, batch_invariant: bool, validate: bool,
) -> AttentionState:  # fmt: skip
    """Call the operator, in a form that torch.compile can trace.

    What the operator's schema would convert in silence is refused here; the rest of the checks are its own.
    """
    _check_flags(causal=causal, return_lse=return_lse, batch_invariant=batch_invariant, validate=validate)
    _check_numbers(scale=scale, window=window, softcap=softcap)
    flat = _flattened(kv)
    by_level = flat.by_level
    lens: list[Tensor | None] = []
    if kv_lens is not None:
        if by_level and (not isinstance(kv_lens, (tuple, list)) or len(kv_lens) != len(flat.k)):
            raise ValueError("kv_lens must be a list with an entry per level of kv, None or lengths")
        each = kv_lens if by_level else [kv_lens]
        lens = [None if x is None else _host_tensor(x) for x in each]
    cu = None if cu_seqlens_q is None else _host_tensor(cu_seqlens_q)
    _check_fake(q, flat, sinks, [*(("kv_lens", x) for x in lens), ("cu_seqlens_q", cu)])
    out, lse = attention_op(
        q, *flat, sinks, lens, cu, max_seqlen_q,
        None if tree is None else tree.handle, scale, causal, window, softcap, return_lse, out_dtype, backend,
        batch_invariant, validate,
    )  # fmt: skip
    return AttentionState(out, lse)


@torch.library.custom_op("hydragen::run", mutates_args=())
def run_op(
    plan: int,
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    by_level: bool,
    offsets: Sequence[Tensor | None],
    page_indices: Tensor | None,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    return_lse: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """`Plan.run`, flattened, of the plan with this handle; lse is empty unless `return_lse`."""
    _refuse_tangents()
    if _run_plan is None:
        raise RuntimeError("hydragen.planned must be imported before its operator is called")
    kv = _unflattened(k, v, by_level, offsets, page_indices)
    with torch.no_grad():
        state = _run_plan(
            of_handle(plan), q, kv, scale, causal, window, softcap, sinks, return_lse, out_dtype
        )
    lse = state.lse if return_lse else q.new_empty(0, dtype=_lse_dtype(q))
    return state.out.contiguous(), lse.contiguous()


@run_op.register_fake
def _(_plan: int, q: Tensor, _k: Sequence[Tensor], v: Sequence[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake(q, v, *rest[-2:])


run_op.register_autograd(_backward)
run_op.register_vmap(_mapped)


def run_in_graph(
    plan: int, q: Tensor, kv: Any, scale: float | None, causal: bool, window: int | None,
    softcap: float | None, sinks: Tensor | None, return_lse: bool, out_dtype: torch.dtype | None,
) -> AttentionState:  # fmt: skip
    """Call the operator of `Plan.run`, in a form that torch.compile can trace."""
    _check_flags(causal=causal, return_lse=return_lse)
    _check_numbers(scale=scale, window=window, softcap=softcap)
    is_pair = isinstance(kv, (tuple, list)) and len(kv) == 2 and isinstance(kv[0], Tensor)
    flat = _Flat([kv[0]], [kv[1]], False, [None], None) if is_pair else _flattened(kv)
    _check_fake(q, flat, sinks)
    out, lse = run_op(plan, q, *flat, scale, causal, window, softcap, sinks, return_lse, out_dtype)
    return AttentionState(out, lse)


class _Flat(NamedTuple):
    """Keys and values as operators take them."""

    k: list[Tensor]
    v: list[Tensor]
    by_level: bool
    offsets: list[Tensor | None]
    page_indices: Tensor | None


def _flattened(kv: Any) -> _Flat:
    """Return keys, values and all that says where they are: of each level, or of all nodes."""
    if isinstance(kv, PagedKV):
        indptr, indices = _host_tensor(kv.page_indptr), _host_tensor(kv.page_indices)
        return _Flat([kv.k_cache], [kv.v_cache], False, [indptr], indices)
    if isinstance(kv, PackedKV):
        return _Flat([kv.k], [kv.v], False, [_host_tensor(kv.cu_seqlens_k)], None)
    if not isinstance(kv, Sequence) or len(kv) == 0:
        raise TypeError("kv must be a list of levels [(k, v), ...], a PackedKV or a PagedKV")
    flat = _Flat([], [], True, [], None)
    for part in kv:
        if isinstance(part, PackedKV):
            keys, values, offset = part.k, part.v, _host_tensor(part.cu_seqlens_k)
        elif isinstance(part, (tuple, list)) and len(part) == 2:
            keys, values, offset = part[0], part[1], None
        else:
            raise TypeError(f"kv must hold pairs (k, v), one per level, got {type(part).__name__}")
        flat.k.append(keys)
        flat.v.append(values)
        flat.offsets.append(offset)
    return flat


def _check_fake(q: Tensor, flat: _Flat, sinks: object, others: Sequence[tuple[str, object]] = ()) -> None:
    """Raise if tensors with and without data are mixed; what a compiler traces it has made alike."""
    if not torch.compiler.is_compiling() and isinstance(q, FakeTensor):
        named = [(f"kv[{i}] {n}", x) for n, xs in (("k", flat.k), ("v", flat.v)) for i, x in enumerate(xs)]
        check_fake(q, [*named, ("sinks", sinks), *others, *(("kv", x) for x in (*flat[3], flat[4]))])


def _check_flags(**flags: object) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {type(flag).__name__}")


def _check_numbers(**numbers: object) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool):
            raise TypeError(f"{name} must be a number or None, got {number}; leave it out for the default")


def _host_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    # what does not hold integers is left as it is, for the operator to refuse
    empty = torch.zeros(0, dtype=torch.int64, device="cpu")
    return torch.as_tensor(value, device="cpu") if len(value) else empty

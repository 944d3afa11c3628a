"""Every argument error of the public ops, whatever the backend."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hydragen.host_ints import IntArray, as_int_vector
from hydragen.kv import NodeKV, PackedKV, levels_tree, node_kv_of_levels, node_kv_of_packed
from hydragen.lengths import KVLens, check_kv_lens
from hydragen.plan import Heads
from hydragen.tree import PrefixTree
from hydragen.types import Options

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = ("auto", "reference", "triton")


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call whose arguments have been checked.

    Attributes
    ----------
    q : tensor [batch, q_len, num_q_heads, head_dim] or packed [total_q, num_q_heads, head_dim]
    q_starts, q_lens : int64 [num_rows]
        First token (in q flattened over tokens) and number of tokens of each row; capacities with `cu_seqlens_q`.
    cu_seqlens_q : integer tensor [num_rows + 1] or None
        Set only if the query lengths live on the device.
    nodes : NodeKV
    tree : PrefixTree
    kv_lens : KVLens
    heads : Heads
    options : Options
    """

    q: Tensor
    q_starts: IntArray
    q_lens: IntArray
    cu_seqlens_q: Tensor | None
    nodes: NodeKV
    tree: PrefixTree
    kv_lens: KVLens
    heads: Heads
    options: Options


def check_attention(
    q: Tensor,
    kv: Sequence[tuple[Tensor, Tensor]] | PackedKV,
    tree: PrefixTree | None,
    kv_lens: object,
    cu_seqlens_q: object,
    max_seqlen_q: int | None,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    return_lse: bool,
    validate: bool,
) -> Call:
    """Check the arguments of `hydragen.attention` and bring them into one form; see there for what they mean."""
    check_tensor(q, "q")
    check_bool(causal, "causal")
    check_bool(return_lse, "return_lse")
    check_bool(validate, "validate")
    if tree is not None and not isinstance(tree, PrefixTree):
        raise TypeError(
            f"tree must be a hydragen.PrefixTree or None, got {type(tree).__name__}; "
            "make one with PrefixTree.from_parents, from_levels or from_token_ids"
        )
    q_starts, q_lens, cu_on_device = _check_queries(q, cu_seqlens_q, max_seqlen_q, validate)
    num_rows = q_lens.size
    if isinstance(kv, PackedKV):
        tree, nodes = _check_packed(kv, tree, num_rows, q)
    else:
        tree, nodes = _check_levels(kv, tree, num_rows, q)
    if tree.num_rows != num_rows:
        raise ValueError(
            f"tree must end one row per sequence of q: q has {num_rows} rows, the tree {tree.num_rows}; "
            "pass row_to_node when making the tree (by default a row ends at each leaf)"
        )
    heads = _check_heads(q, nodes)
    lens = check_kv_lens(kv_lens, tree, nodes, q.device, validate)
    options = Options(
        check_scale(scale, heads.head_dim),
        causal,
        _check_window(window),
        _check_softcap(softcap),
        _check_sinks(sinks, heads.num_q_heads, q.device),
        return_lse,
    )
    return Call(q, q_starts, q_lens, cu_on_device, nodes, tree, lens, heads, options)


def check_backend(backend: str) -> None:
    """Raise unless `backend` names one."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}; choose one of them")


def check_tensor(x: object, name: str, like: Tensor | None = None, ref: str = "q") -> Tensor:
    """Return `x` if it is a floating-point tensor with data, of `like`'s dtype and on its device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}; convert it with torch.as_tensor")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}; convert it with .to_dense()")
    if x.dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{name} must have one of the dtypes {names}, got {x.dtype}; convert it with .to(dtype)")
    if x.is_meta:
        raise ValueError(f"{name} must hold data, got a meta tensor; move it with .to_empty or make it on a device")
    if like is not None and x.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {ref}, {like.dtype}, got {x.dtype}; convert it with .to(dtype)")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} must be on the device of {ref}, {like.device}, got {x.device}; move it with .to(device)")
    return x


def check_bool(x: object, name: str) -> None:
    """Raise unless `x` is True or False."""
    if not isinstance(x, bool):
        raise TypeError(f"{name} must be True or False, got {x!r} of type {type(x).__name__}; pass a bool")


def check_scale(scale: float | None, head_dim: int) -> float:
    """Return the factor of the dot products, head_dim ** -0.5 by default."""
    if scale is None:
        return float(head_dim**-0.5)
    return _check_number(scale, "scale", "a finite number or None", "None means head_dim ** -0.5")


def _check_number(x: object, name: str, expected: str, remedy: str) -> float:
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name} must be {expected}, got {x!r} of type {type(x).__name__}; {remedy}")
    if not math.isfinite(x):
        raise ValueError(f"{name} must be {expected}, got {x!r}; {remedy}")
    return float(x)


def _check_window(window: int | None) -> int | None:
    expected = "window must be None or an integer of at least 1"
    remedy = "window=W lets a query see its own position and the W - 1 before it"
    if window is None:
        return None
    if isinstance(window, bool) or not isinstance(window, numbers.Integral):
        raise TypeError(f"{expected}, got {window!r} of type {type(window).__name__}; {remedy}")
    if window < 1:
        raise ValueError(f"{expected}, got {window}; {remedy}")
    return min(int(window), 2**30)  # beyond any position: no limit


def _check_softcap(softcap: float | None) -> float | None:
    if softcap is None:
        return None
    value = _check_number(softcap, "softcap", "a positive finite number or None", "None means no cap")
    if value <= 0:
        raise ValueError(f"softcap must be a positive finite number or None, got {softcap!r}; None means no cap")
    return value


def _check_sinks(sinks: object, num_q_heads: int, device: torch.device) -> Tensor | None:
    if sinks is None:
        return None
    tensor = check_tensor(sinks, "sinks")
    if tensor.shape != (num_q_heads,):
        raise ValueError(
            f"sinks must have shape [num_q_heads] = [{num_q_heads}], got {list(tensor.shape)}; give one logit per head"
        )
    if tensor.device != device:
        raise ValueError(f"sinks must be on the device of q, {device}, got {tensor.device}; move it with .to(device)")
    return tensor


def _check_queries(
    q: Tensor, cu_seqlens_q: object, max_seqlen_q: object, validate: bool
) -> tuple[IntArray, IntArray, Tensor | None]:
    if cu_seqlens_q is None:
        if max_seqlen_q is not None:
            raise ValueError(
                f"max_seqlen_q goes with cu_seqlens_q, got max_seqlen_q={max_seqlen_q!r} without it; leave it out"
            )
        if q.dim() != 4:
            raise ValueError(
                f"q must be [batch, q_len, num_q_heads, head_dim], got shape {list(q.shape)}; "
                "packed q [total_q, num_q_heads, head_dim] needs cu_seqlens_q"
            )
        batch, q_len = q.shape[:2]
        if q_len < 1:
            raise ValueError(f"q must have at least one query per row, got shape {list(q.shape)}; q_len is its size 1")
        return np.arange(batch) * q_len, np.full(batch, q_len), None
    if q.dim() != 3:
        raise ValueError(
            f"q must be packed, [total_q, num_q_heads, head_dim], when cu_seqlens_q is given, got shape "
            f"{list(q.shape)}; leave cu_seqlens_q out for [batch, q_len, num_q_heads, head_dim]"
        )
    if isinstance(cu_seqlens_q, Tensor) and cu_seqlens_q.device.type != "cpu":
        return _check_device_cu_seqlens_q(q, cu_seqlens_q, max_seqlen_q, validate)
    cu = check_cu_seqlens(cu_seqlens_q, "cu_seqlens_q", q.shape[0], "q")
    lens = np.diff(cu)
    if max_seqlen_q is not None and (isinstance(max_seqlen_q, bool) or not isinstance(max_seqlen_q, numbers.Integral)):
        raise TypeError(f"max_seqlen_q must be an integer or None, got {max_seqlen_q!r}; leave it out")
    if isinstance(max_seqlen_q, numbers.Integral) and lens.size and lens.max() > max_seqlen_q:
        raise ValueError(
            f"max_seqlen_q must be at least the longest row, {lens.max()} tokens, got {max_seqlen_q}; leave it out"
        )
    return cu[:-1], lens, None


def _check_device_cu_seqlens_q(
    q: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: object, validate: bool
) -> tuple[IntArray, IntArray, Tensor | None]:
    if cu_seqlens_q.device != q.device:
        raise ValueError(
            f"cu_seqlens_q must be on the host or on the device of q, {q.device}, got {cu_seqlens_q.device}; "
            "move it with .to(device)"
        )
    if cu_seqlens_q.dtype not in (torch.int32, torch.int64) or cu_seqlens_q.dim() != 1 or cu_seqlens_q.numel() < 1:
        raise TypeError(
            "cu_seqlens_q must be an int32 or int64 vector of num_rows + 1 offsets, got "
            f"{cu_seqlens_q.dtype} {list(cu_seqlens_q.shape)}; convert it with .int()"
        )
    if isinstance(max_seqlen_q, bool) or not isinstance(max_seqlen_q, numbers.Integral) or max_seqlen_q < 1:
        raise ValueError(
            "max_seqlen_q must be given as an integer of at least 1 when cu_seqlens_q lives on a device (it is not "
            f"read back), got {max_seqlen_q!r}; pass the longest row's query tokens"
        )
    if validate:
        lens = np.diff(check_cu_seqlens(cu_seqlens_q.cpu(), "cu_seqlens_q", q.shape[0], "q"))
        if lens.size and lens.max() > max_seqlen_q:
            raise ValueError(f"max_seqlen_q must be at least the longest row, {lens.max()}, got {max_seqlen_q}; raise it")
    num_rows = cu_seqlens_q.numel() - 1
    # rows of equal capacity; which tokens they hold is computed on the device
    return np.arange(num_rows) * int(max_seqlen_q), np.full(num_rows, int(max_seqlen_q)), cu_seqlens_q


def check_cu_seqlens(value: object, name: str, total: int, of: str) -> IntArray:
    """Return offsets on the host as int64: from 0, never decreasing, up to the `total` tokens of `of`."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        raise ValueError(
            f"{name} must be on the host (it is planned from, and never read back), got device {value.device}; "
            "keep a copy with .cpu(); lengths that change on the device go to kv_lens"
        )
    cu = as_int_vector(value, name)
    if cu.size < 1 or cu[0] != 0:
        raise ValueError(f"{name} must begin with 0, got {cu[:4].tolist()}; give the offsets of all entries and the end")
    if (np.diff(cu) < 0).any():
        at = int(np.flatnonzero(np.diff(cu) < 0)[0])
        raise ValueError(
            f"{name} must not decrease, got {cu[at]} then {cu[at + 1]} at index {at}; give cumulative offsets"
        )
    if cu[-1] != total:
        raise ValueError(f"{name} must end with the number of tokens in {of}, {total}, got {cu[-1]}; check the last offset")
    return cu


def _check_levels(
    kv: object, tree: PrefixTree | None, num_rows: int, q: Tensor
) -> tuple[PrefixTree, NodeKV]:
    if isinstance(kv, Tensor) or not isinstance(kv, Sequence) or len(kv) == 0:
        raise TypeError(
            "kv must be a list of levels [(k, v), ...] or a hydragen.PackedKV, got "
            f"{type(kv).__name__}{' without entries' if isinstance(kv, Sequence) else ''}; "
            "for one shared prefix pass [(prefix_k, prefix_v), (suffix_k, suffix_v)]"
        )
    levels: list[tuple[Tensor, Tensor]] = []
    for i, level in enumerate(kv):
        if not isinstance(level, Sequence) or len(level) != 2:
            raise TypeError(f"kv[{i}] must be a pair (k, v), got {type(level).__name__}; pass [(k, v), ...], one per level")
        k = check_tensor(level[0], f"kv[{i}] k", q)
        v = check_tensor(level[1], f"kv[{i}] v", q)
        if k.dim() != 4 or v.dim() != 4:
            raise ValueError(
                f"kv[{i}] must hold k and v of shape [nodes, len, num_kv_heads, head_dim], got {list(k.shape)} and "
                f"{list(v.shape)}; packed tensors go into a hydragen.PackedKV"
            )
        if k.shape[:3] != v.shape[:3]:
            raise ValueError(
                f"kv[{i}] must have k and v with the same nodes, len and num_kv_heads, got {list(k.shape)} and "
                f"{list(v.shape)}; only the last size may differ"
            )
        for x, name, at in ((k, "k", 3), (v, "v", 3)):
            first = levels[0][0 if name == "k" else 1] if levels else x
            if x.shape[2:] != first.shape[2:]:
                raise ValueError(
                    f"kv[{i}] {name} must have num_kv_heads and head_dim like kv[0], {list(first.shape[2:])}, got "
                    f"{list(x.shape[2:])} (sizes 2 and {at}); give all levels the same heads"
                )
        levels.append((k, v))
    sizes = tuple(k.shape[0] for k, _ in levels)
    if tree is None:
        for i, (above, below) in enumerate(zip(sizes, (*sizes[1:], num_rows), strict=True)):
            what = f"kv[{i + 1}]" if i + 1 < len(sizes) else "the batch of q"
            if (above == 0 and below > 0) or (above > 0 and below % above != 0):
                raise ValueError(
                    f"kv must have levels whose numbers of nodes divide one another and the batch, but kv[{i}] has "
                    f"{above} nodes and {what} {below}; pass tree= for uneven groups"
                )
        tree = levels_tree(sizes, num_rows)
    found = tuple(nodes.size for nodes in tree.level_nodes)
    if found != sizes and not (sum(found) == 0 and sum(sizes) == 0):
        raise ValueError(
            "kv must have one level per depth of the tree with one entry per node of that depth: the tree has "
            f"{list(found)} nodes by depth, kv {list(sizes)}; order the nodes of a level by their index in the tree"
        )
    return tree, node_kv_of_levels(levels, tree)


def _check_packed(kv: PackedKV, tree: PrefixTree | None, num_rows: int, q: Tensor) -> tuple[PrefixTree, NodeKV]:
    k, v = check_tensor(kv.k, "kv.k", q), check_tensor(kv.v, "kv.v", q)
    if k.dim() != 3 or v.dim() != 3 or k.shape[:2] != v.shape[:2]:
        raise ValueError(
            "kv.k and kv.v must be [total_k, num_kv_heads, head_dim] and [total_k, num_kv_heads, head_dim_v], got "
            f"{list(k.shape)} and {list(v.shape)}; padded tensors go into a list of levels"
        )
    cu = check_cu_seqlens(kv.cu_seqlens_k, "kv.cu_seqlens_k", k.shape[0], "kv.k")
    num_nodes = cu.size - 1
    if tree is None:
        if num_nodes != num_rows:
            raise ValueError(
                f"tree must be given when kv.cu_seqlens_k describes {num_nodes} nodes and q has {num_rows} rows: "
                "without it node i belongs to row i alone; pass tree=PrefixTree.from_parents(...)"
            )
        tree = _forest_of_roots(num_rows)
    if tree.num_nodes != num_nodes:
        raise ValueError(
            f"kv.cu_seqlens_k must have one entry per node and one more, {tree.num_nodes} + 1, got {cu.size}; "
            "empty nodes count too"
        )
    return tree, node_kv_of_packed(k, v, cu)


def _forest_of_roots(num_rows: int) -> PrefixTree:
    return levels_tree((num_rows,), num_rows)


def _check_heads(q: Tensor, nodes: NodeKV) -> Heads:
    num_q_heads, head_dim = q.shape[-2:]
    num_kv_heads, k_dim = nodes.k[0].shape[-2:]
    head_dim_v = nodes.v[0].shape[-1]
    if k_dim != head_dim:
        raise ValueError(f"kv must have k with the head_dim of q, {head_dim}, got {k_dim}; their last sizes must agree")
    for name, dim in (("q's head_dim", head_dim), ("v's head_dim_v", head_dim_v)):
        if not 1 <= dim <= 256:
            raise ValueError(f"{name} must be from 1 to 256, got {dim}; larger heads are not supported")
    if num_kv_heads < 1 or num_q_heads < 1 or num_q_heads % num_kv_heads != 0:
        raise ValueError(
            f"num_q_heads must be a positive multiple of num_kv_heads, got {num_q_heads} and {num_kv_heads}; "
            "repeat or drop heads so that every KV head serves equally many query heads"
        )
    return Heads(num_q_heads, num_kv_heads, head_dim, head_dim_v, q.element_size())

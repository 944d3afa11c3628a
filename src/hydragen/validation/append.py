"""Argument errors of `Plan.append`."""

from __future__ import annotations

import torch
from torch import Tensor

from hydragen.kv import KV, NodeKV
from hydragen.transforms import check_untransformed
from hydragen.tree import PrefixTree
from hydragen.validation.planned import Planned, check_like, tensors_of_run
from hydragen.validation.tensors import check_tensor


def check_append(
    planned: Planned, kv: KV | tuple[Tensor, Tensor], k: object, v: object
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the tensors that hold the keys and values of the rows' last nodes, and the new ones that fit."""
    tensors, nodes = tensors_of_run(planned, kv), planned.nodes
    if len(planned.q_shape) != 4:
        raise ValueError(
            f"append needs queries in a batch [num_rows, q_len, ...], got a plan for packed ones, "
            f"{list(planned.q_shape)}; write to the tensors yourself"
        )
    level = last_level(planned.tree, nodes)
    where = f"kv[{level}]" if nodes.by_level else "kv"
    caches, fresh = [], []
    for x, new, held, name in zip(tensors[level], (k, v), (nodes.k, nodes.v), "kv", strict=True):
        cache = check_like(x, held[level], f"{where} {name}", planned.like)
        tensor = check_tensor(new, name, planned.like)
        shape = (*planned.q_shape[:2], *cache.shape[-2:])
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {list(shape)}, tokens and KV heads as planned, got "
                f"{list(tensor.shape)}; one entry per row and query token"
            )
        _check_writable(cache, x, f"{where} {name}")
        _check_no_gradient(cache, f"{where} {name}")
        _check_no_gradient(tensor, name)
        check_untransformed(
            "Plan.append", "append outside of it", [(f"{where} {name}", cache), (name, tensor)]
        )
        caches.append(cache)
        fresh.append(tensor)
    one = k is v and caches[0].data_ptr() == caches[1].data_ptr() and caches[0].stride() == caches[1].stride()
    if not one and entangled(*caches):
        raise ValueError(
            f"{where} v must have memory of its own, or new values would overwrite new keys, got that of "
            f"{where} k; pass the same tensor as k and v if they are the same, or copy one"
        )
    for tensor, name in zip(fresh, "kv", strict=True):
        for cache, held_name in zip(caches, "kv", strict=True):
            if entangled(tensor, cache):
                raise ValueError(
                    f"{name} must not lie in {where} {held_name}, to which it is written, got a part of it; "
                    "pass a clone"
                )
    return (caches[0], caches[1]), (fresh[0], fresh[1])


def last_level(tree: PrefixTree, nodes: NodeKV) -> int:
    """Return the level, of those that hold tensors, in which the rows end that have room."""
    ends = tree.row_to_node
    return int(nodes.level[ends[(nodes.capacity[ends] > 0).argmax()]]) if ends.size else 0


def entangled(a: Tensor, b: Tensor) -> bool:
    """Whether an element of `a` lies where one of `b` does; strides are those of `_check_writable`."""
    apart, rest = divmod(b.data_ptr() - a.data_ptr(), a.element_size())
    spans = [sum(s * (n - 1) for s, n in zip(x.stride(), x.shape, strict=True)) for x in (a, b)]
    if not a.numel() or not b.numel() or apart > spans[0] or -apart > spans[1]:
        return False
    if rest or a.stride() != b.stride():
        return True  # entangled in a way that nobody needs
    # `apart` as a sum of strides times differences of indices, the largest first
    return _reachable(apart, sorted(zip(a.stride(), a.shape, b.shape, strict=True), reverse=True))


def _reachable(apart: int, steps: list[tuple[int, int, int]]) -> bool:
    if not steps:
        return apart == 0
    (stride, size_a, size_b), *smaller = steps
    reach = sum(s * max(m, n) for s, m, n in smaller)
    low = max(-(-(apart - reach) // max(stride, 1)), 1 - size_b)
    high = min((apart + reach) // max(stride, 1), size_a - 1)
    return any(_reachable(apart - by * stride, smaller) for by in range(low, high + 1))


def _check_writable(cache: Tensor, given: object, name: str) -> None:
    reach, own = 0, cache is given
    for stride, size in sorted(zip(cache.stride(), cache.shape, strict=True)):
        own = own and (size == 1 or stride > reach)  # each step beyond all that smaller ones reach
        reach += stride * (size - 1)
    if not own and cache.numel():
        raise ValueError(
            f"{name} must have a place for each element to append to, got a view with strides "
            f"{list(cache.stride())}; make it with .contiguous()"
        )
    if cache.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name} must not be a tensor made under torch.inference_mode where that is not on, got such a "
            "one; append under inference_mode too, or make it outside"
        )


def _check_no_gradient(x: Tensor, name: str) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require gradients, which do not pass through a cache, got requires_grad=True; "
            "append under torch.no_grad()"
        )

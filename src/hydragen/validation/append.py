"""Argument errors of `Plan.append`."""

from __future__ import annotations

import torch
from torch import Tensor

from hydragen.kv import KV
from hydragen.transforms import check_untransformed
from hydragen.validation.planned import Planned, check_like, tensors_of_run
from hydragen.validation.tensors import check_tensor


def check_append(
    planned: Planned, kv: KV | tuple[Tensor, Tensor], k: object, v: object
) -> tuple[Tensor, Tensor]:
    """Return the tensors that hold the keys and values of the rows' last nodes, if new ones fit them."""
    tensors, nodes = tensors_of_run(planned, kv), planned.nodes
    ends = planned.tree.row_to_node
    level = int(nodes.level[ends[0]]) if ends.size else 0
    where = f"kv[{level}]" if nodes.by_level else "kv"
    caches = []
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
    if caches[0].data_ptr() == caches[1].data_ptr() and caches[0].numel() and k is not v:
        raise ValueError(
            f"{where} v must have memory of its own, or new values would overwrite new keys, got that of "
            f"{where} k; pass the same tensor as k and v if they are the same, or copy one"
        )
    return caches[0], caches[1]


def _check_writable(cache: Tensor, given: object, name: str) -> None:
    if cache is not given or any(s == 0 and n > 1 for s, n in zip(cache.stride(), cache.shape, strict=True)):
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

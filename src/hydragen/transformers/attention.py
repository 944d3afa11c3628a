"""The attention implementation "hydragen" of transformers: a function for attention and one for its mask."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hydragen.api import attention
from hydragen.transformers.layers import PrefixLayer, take_handed_over

NAME = "hydragen"
_WARNED = False


def register() -> None:
    """Make attn_implementation="hydragen" known to transformers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: PrefixLayer | Tensor,
    value: PrefixLayer | Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as a transformers model calls it.

    Over a PrefixCache this is `hydragen.attention`; over plain keys and values (no cache, or an ordinary one)
    it is ordinary attention.

    Parameters
    ----------
    query : tensor [rows, num_q_heads, tokens, head_dim]
    key, value : PrefixLayer, or tensors [rows, num_kv_heads, kv_tokens, head_dim or head_dim_v]
    attention_mask : what `make_mask` made
    position_ids : tensor [rows or 1, tokens], optional
    sliding_window, softcap, s_aux : optional
        What the layer has: a window (a PrefixCache knows it), Gemma 2's soft cap, gpt-oss's sinks.

    Returns
    -------
    (tensor [rows, tokens, num_q_heads, head_dim_v], None)
    """
    layer = key if isinstance(key, PrefixLayer) else take_handed_over()
    if others.get("output_attentions"):
        raise ValueError(
            "output_attentions must be False, because the weights are never in one place, got True; "
            'set_attn_implementation("eager") to look at them'
        )
    if layer is None:
        return _ordinary(module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux), None
    if sliding_window is not None and sliding_window != layer.window:
        raise ValueError(
            f"layer {layer.index} must have the sliding window of its model's config, {layer.window}, got "
            f"{sliding_window}; make the cache for the model that uses it"
        )
    options = {"scale": scaling, "window": layer.window, "softcap": softcap, "sinks": s_aux}
    return _over_cache(module, layer, query, key, value, attention_mask, position_ids, dropout, options), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no types for it
def _over_cache(
    module: nn.Module, layer: PrefixLayer, query: Tensor, key: Any, value: Any, mask: Tensor | None,
    position_ids: Tensor | None, dropout: float, options: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Store a layer's new tokens and attend over its rows.

    What rows hold is counted on the host: torch.compile leaves this out of its graphs.
    """
    if id(module) not in layer.modules:
        raise ValueError(
            f"a PrefixCache must be used with the model that it was made for, got a {type(module).__name__} "
            "of another; prefill the prompt again: PrefixCache(model).prefill(ids)"
        )
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            "attention_mask must be [rows, tokens] over a PrefixCache, which knows who sees what, got "
            f"{list(mask.shape)}; mark padding only, or use an ordinary cache"
        )
    if dropout:
        raise ValueError(f"dropout must be 0 over a PrefixCache, got {dropout}; call model.eval()")
    if torch.is_autocast_enabled(query.device.type):  # as PyTorch's own attention does
        dtype = torch.get_autocast_dtype(query.device.type)
        query = query.to(dtype)
        if layer.expands:
            key, value = key.to(dtype), value.to(dtype)
        elif layer.incoming is not None:
            layer.incoming = layer.incoming[0].to(dtype), layer.incoming[1].to(dtype)
    if layer.expands:
        layer.store(key, value, position_ids, mask)
    elif layer.incoming is not None:  # None where a layer reuses what another has stored
        k, v = layer.incoming
        layer.incoming = None
        layer.store(k, v, position_ids, mask)
    return read_levels(layer, query.transpose(1, 2), options)


def read_as_usual(layer: PrefixLayer, q: Tensor, options: dict[str, Any]) -> Tensor:
    """Attention of q [rows, tokens, num_q_heads, head_dim] over what the layer holds for its rows."""
    rows, kv = layer.rows, layer.kv()
    tree, causal, plans = rows.step.tree, rows.step.causal, rows.step.plans
    if plans is None:
        out = attention(q, kv, tree=tree, kv_lens=rows.kv_lens(), causal=causal, **options)
    else:
        out = plans.get(tree, kv, q.shape[2], rows.kv_lens()).run(q, kv, **options)
    return cast("Tensor", out)  # without return_lse it is one


# What layers call: the benchmark puts other ways of reading in its place.
read_levels = read_as_usual


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **options: Any,
) -> Tensor | None:
    """Over a PrefixCache, which tokens are no padding, bool [rows, all or new tokens]; else sdpa's mask."""
    if kv_length == 0:
        if use_vmap or not allow_is_causal_skip:
            raise ValueError(
                "the model masks its attention in a way of its own (images, packed sequences, blocks), which "
                'a PrefixCache cannot do; set_attn_implementation("sdpa") and an ordinary cache can'
            )
        return None if attention_mask is None else attention_mask.bool()
    if isinstance(q_offset, int) and q_offset > 0:
        _warn_once()
    mask: Tensor | None = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        **options,
    )
    return mask


def _ordinary(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None,
    dropout: float, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention over plain keys and values; [rows, tokens, num_q_heads, head_dim_v]."""
    if softcap is None and sinks is None:
        out: Tensor = sdpa_attention_forward(module, q, k, v, mask, dropout=dropout, scaling=scaling)[0]
        return out
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    logits = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is None and q.shape[2] > 1:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    elif mask is not None:  # what is added to logits, as a caller may bring it
        logits = logits + mask
    if sinks is not None:
        extra = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, extra], dim=-1)
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32)[..., : k.shape[2]].to(v.dtype)
    return (nn.functional.dropout(weights, dropout, module.training) @ v).transpose(1, 2)


def _warn_once() -> None:
    global _WARNED
    if not _WARNED:
        _WARNED = True
        warnings.warn(
            'attn_implementation="hydragen" goes on from an ordinary cache, which holds prompts once per '
            "row: correct, but nothing is shared. Use hydragen.generate, or pass "
            "past_key_values=hydragen.transformers.PrefixCache(model).prefill(ids).fork(n)",
            UserWarning,
            stacklevel=2,
        )
